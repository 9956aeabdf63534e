"""A site's training script, as any user's own: plain SGD on the next images, on FLARE's client API."""

from __future__ import annotations

import argparse

import nvflare.client as flare
import torch
from brain.task import train
from sites import NETS, site_images


def main() -> None:
    """Trains in every round on the images that `site_images` gives."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--net", choices=list(NETS), default="lenet")
    parser.add_argument("--data", default="")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--local-steps", type=int, default=1)
    parser.add_argument("--learning-rate", type=float, default=0.1)
    arguments = parser.parse_args()
    flare.init()
    site = flare.get_site_name()
    while flare.is_running():
        received = flare.receive()
        count = arguments.batch_size * arguments.local_steps
        images, labels = site_images(site, received.current_round, data=arguments.data, count=count)
        model = NETS[arguments.net]()
        model.load_state_dict({name: torch.as_tensor(array) for name, array in received.params.items()})
        loss = train(model, images, labels, arguments.batch_size, arguments.learning_rate)
        flare.send(
            flare.FLModel(
                params=model.state_dict(),
                metrics={"loss": loss},
                meta={"NUM_STEPS_CURRENT_ROUND": arguments.local_steps},
            )
        )


if __name__ == "__main__":
    main()
