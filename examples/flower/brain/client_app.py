"""The client: plain training, with MedPFL's mods around it where the run asks for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from brain.task import Net, client_images, initial_model, round_images, train
from medpfl.core.domain import Batch, Recipe
from medpfl.core.tasks import SingleLabel
from medpfl.defenses import Clip, Composition, Gaussian
from medpfl.integrations.flower import DefenseMod, GateMod
from medpfl.integrations.flower.secagg import SecureMod
from medpfl.models import prepare


def trained(context: Context, number: int, load: Callable[[Net], None]) -> tuple[Net, int, float]:
    """One round of a client: the model that came, trained on the next images."""
    config = context.run_config
    images, labels = own_images(context, number)
    model = initial_model()
    load(model)
    loss = train(model, images, labels, int(config["batch-size"]), float(config["learning-rate"]))
    return model, len(images), loss


def own_images(context: Context, number: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The images of that round."""
    config = context.run_config
    partition = int(context.node_config["partition-id"])
    images, labels = client_images(str(config["data"]), partition, int(config["images"]), int(config["seed"]))
    return round_images(images, labels, number, int(config["batch-size"]) * int(config["local-steps"]))


def protect(message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
    """Clipping and noise, or the leakage gate, where the run asks for them."""
    config = context.run_config
    if float(config["noise"]) > 0:
        defense = Composition(parts=(Clip(bound=float(config["bound"])), Gaussian(std=float(config["noise"]))))
        return DefenseMod(defense)(message, context, call_next)
    if config["gate"]:
        number = int(message.content["config"]["server-round"])
        model = prepare(initial_model(), name="net", image_shape=(1, 32, 32), task=SingleLabel(2))
        recipe = Recipe(
            update="weights",
            batch_size=int(config["batch-size"]),
            local_steps=int(config["local-steps"]),
            learning_rate=float(config["learning-rate"]),
        )
        return GateMod(model, lambda _: Batch(*own_images(context, number)), recipe)(message, context, call_next)
    return call_next(message, context)


def secure_train(
    arrays: list[Any], config: Mapping[str, Any], context: Context
) -> tuple[list[Any], int, dict[str, Any]]:
    """The same training for SecAgg+, which speaks of lists of arrays."""
    state = context.state.config_records.setdefault("rounds", _count())
    state["done"] = int(state["done"]) + 1

    def load(model: Net) -> None:
        names = list(model.state_dict())
        model.load_state_dict({name: torch.from_numpy(array) for name, array in zip(names, arrays, strict=True)})

    model, examples, loss = trained(context, int(state["done"]), load)
    return [tensor.numpy() for tensor in model.state_dict().values()], examples, {"loss": loss}


def _count() -> Any:
    from flwr.app import ConfigRecord

    return ConfigRecord({"done": 0})


app = ClientApp(mods=[SecureMod(secure_train), protect])


@app.train()
def on_train(message: Message, context: Context) -> Message:
    """One local round."""
    number = int(message.content["config"]["server-round"])
    model, examples, loss = trained(
        context, number, lambda model: model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    )
    content = RecordDict(
        {
            "arrays": ArrayRecord(model.state_dict()),
            "metrics": MetricRecord({"num-examples": examples, "loss": loss}),
        }
    )
    return Message(content, reply_to=message)
