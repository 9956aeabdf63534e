"""Scale-MIA against its ceiling: what the decoder makes of the true latents of images alone in their bin."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from attacked_rounds import AttackedRound, attacked_round
from torch import Tensor, nn

from medpfl.attacks.crafted import ServerView
from medpfl.attacks.latent_bins import HiddenLayer, hidden_layer
from medpfl.attacks.latent_decoder import latent_shape
from medpfl.attacks.scale_mia import ScaleMia, ceiling
from medpfl.core.domain import Auxiliary, Batch, GlobalModel, Knowledge, Recipe
from medpfl.core.errors import AttackFailure, Interrupted
from medpfl.core.session import State
from medpfl.core.tasks import SingleLabel
from medpfl.federation import Channel, Plain, SecAggPlus, SecureSum
from medpfl.models import build_model, prepare

SGD = Recipe(update="weights", learning_rate=0.1)
ADAM = Recipe(update="weights", optimizer="adam", learning_rate=1e-3)
SHORT = ScaleMia(steps=30, width=8)


def disks(count: int, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    """A bright disk (or ball) of random place, size and brightness on a dark ground."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.meshgrid(*[torch.linspace(-1, 1, side) for side in shape[1:]], indexing="ij")
    found = []
    for _ in range(count):
        center = torch.rand(len(axes), generator=generator) - 0.5
        radius, level = (0.3 + 0.5 * torch.rand(2, generator=generator)).tolist()
        distance = sum((axis - place) ** 2 for axis, place in zip(axes, center, strict=True))
        found.append((0.1 + level * torch.sigmoid(20 * (radius**2 - torch.as_tensor(distance)))).expand(shape))
    return torch.stack(found)


def network(shape: tuple[int, ...] = (1, 12, 12)) -> GlobalModel:
    generator = torch.Generator().manual_seed(0)
    return build_model("cnn_fedavg", image_shape=shape, task=SingleLabel(3), generator=generator)


def scale_round(
    attack: ScaleMia, model: GlobalModel, *, size: int = 12, channel: Channel | None = None, recipe: Recipe = SGD
) -> AttackedRound:
    channel = channel or Plain()
    held = size * channel.client_count
    images = disks(held + 150, tuple(model.image_shape))
    targets = torch.arange(len(images)) % 3
    batches = [Batch(images[start : start + size], targets[start : start + size]) for start in range(0, held, size)]
    auxiliary = Auxiliary(images[held:], targets[held:])
    return attacked_round(attack, model, batches, auxiliary, replace(recipe, batch_size=size), channel=channel)


def seen_by_the_dense_layer(model: GlobalModel, images: Tensor) -> Tensor:
    """The latents of FedAvg's CNN, computed with nothing but PyTorch's functions."""
    parameters, seen = model.parameters, images
    for place in ("body.0", "body.3"):
        seen = nn.functional.conv2d(seen, parameters[f"{place}.weight"], parameters[f"{place}.bias"], padding=2)
        seen = nn.functional.max_pool2d(torch.relu(seen), 2)
    return torch.flatten(seen, 1)


def readable(found: AttackedRound) -> Tensor:
    """Images whose mean latent is the only one between two edges."""
    values = seen_by_the_dense_layer(found.broadcast.model(0), torch.cat(found.clients)).double().mean(dim=1)
    bins = [int((value > found.broadcast.secret["edges"]).sum()) for value in values]
    return torch.tensor([bins.count(own) == 1 for own in bins])


def gaps(found: AttackedRound) -> Tensor:
    """How far (root mean square) the best candidate is from the ceiling, for every image alone in its bin."""
    best = ceiling(found.broadcast, torch.cat(found.clients)[readable(found)]).clamp(0, 1)
    distances = torch.cdist(best.double().flatten(1), found.result.images.double().flatten(1))
    root: Tensor = distances.amin(dim=1) / best[0].numel() ** 0.5
    return root


@pytest.mark.parametrize(
    "channel", [Plain(), SecureSum(clients=2), SecAggPlus(clients=2)], ids=["plain", "secure sum", "secagg"]
)
def test_what_comes_back_is_the_ceiling_for_images_alone_in_their_bin(channel: Channel) -> None:
    found = scale_round(SHORT, network(), channel=channel)
    assert int(readable(found).sum()) >= 8 * channel.client_count
    assert float(gaps(found).max()) < 0.01
    assert len(found.result.images) <= found.observation.examples
    assert "decoder's own error" in found.result.notes[0]


@pytest.mark.parametrize("channel", [Plain(), SecureSum(clients=2)], ids=["plain", "secure sum"])
def test_one_step_of_adam_shows_the_latents_too(channel: Channel) -> None:
    found = scale_round(SHORT, network(), channel=channel, recipe=ADAM)
    assert float(gaps(found).quantile(0.9)) < 0.01


def test_longer_training_raises_the_ceiling_above_the_best_constant_image() -> None:
    model, errors = network(), []
    for steps in (10, 150):
        found = scale_round(ScaleMia(steps=steps, width=8, scale=1e-3), model)
        images = found.clients[0]
        errors.append(float((ceiling(found.broadcast, images) - images).square().mean()))
    constant = disks(150, (1, 12, 12), seed=1).mean(dim=0)
    assert errors[1] < 0.3 * float((images - constant).square().mean())
    assert errors[1] < errors[0]


def test_the_architecture_stays_and_the_encoder_only_where_it_is_asked_for() -> None:
    model = network()
    for encoder in ("trained", "as_sent"):
        sent = scale_round(replace(SHORT, encoder=encoder, scale=1e-2), model).broadcast.models
        assert len(sent) == 1
        assert sent[0].module is model.module
        same = [
            torch.equal(sent[0].parameters[name], model.parameters[name]) for name in ("body.0.weight", "body.3.bias")
        ]
        assert all(same) == (encoder == "as_sent")
        assert {name: tensor.shape for name, tensor in sent[0].parameters.items()} == {
            name: tensor.shape for name, tensor in model.parameters.items()
        }
    assert SHORT.needs() == {"parameters"}


class Halting:
    """Stops the training once, at a step, with its state."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.saved: State | None = None
        self.steps: list[tuple[int, int]] = []

    def restore(self) -> State | None:
        return self.saved

    def checkpoint(self, done: int, total: int, state: Callable[[], State]) -> None:
        self.steps.append((done, total))
        if done == self.at and self.saved is None:
            self.saved = state()
            raise Interrupted("stopped")


def test_training_is_bounded_shows_progress_and_goes_on_bit_by_bit() -> None:
    model, images = network(), disks(60, (1, 12, 12))
    auxiliary = Auxiliary(images, torch.arange(60) % 3)
    attack = replace(SHORT, scale=1e-2)
    recipe = replace(SGD, batch_size=4)

    def view(session: Any) -> ServerView:
        return ServerView(
            model,
            recipe,
            "weights",
            Plain(),
            4,
            "malicious_server",
            attack.needs(),
            Knowledge(auxiliary=auxiliary),
            session,
        )

    whole = attack.prepare(view(once := Halting(0)), torch.Generator().manual_seed(0))
    assert once.steps == [(done, 30) for done in range(1, 31)]
    stopped = Halting(17)
    with pytest.raises(Interrupted):
        attack.prepare(view(stopped), torch.Generator().manual_seed(0))
    resumed = attack.prepare(view(stopped), torch.Generator().manual_seed(0))
    assert stopped.steps[17] == (18, 30)
    for name, tensor in whole.secret.items():
        assert torch.equal(tensor, resumed.secret[name])
    other = Halting(0)
    other.saved = {}  # what a read-out saved
    attack.prepare(view(other), torch.Generator().manual_seed(0))
    assert len(other.steps) == 30


def test_where_the_latents_are_a_map() -> None:
    def shape_of(model: GlobalModel) -> tuple[int, ...]:
        layer = hidden_layer(model)
        assert isinstance(layer, HiddenLayer)
        return latent_shape(model, layer)

    assert shape_of(network((3, 12, 16))) == (64, 3, 4)
    assert shape_of(network((1, 8, 8, 12))) == (64, 2, 2, 3)
    pooled = nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(600, 20), nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 3)
    )
    model = prepare(pooled, name="bottleneck", image_shape=(1, 12, 12), task=SingleLabel(3))
    assert "something else than one ReLU" in (SHORT.why_not(model, SGD, "weights", 1) or "")


@pytest.mark.parametrize("shape", [(3, 9, 13), (1, 8, 8, 12)], ids=["color, odd sides", "volume"])
def test_colors_odd_sides_and_volumes(shape: tuple[int, ...]) -> None:
    found = scale_round(replace(SHORT, steps=5, scale=1e-3), network(shape), size=4)
    assert found.result.images.shape[1:] == shape
    assert 1 <= len(found.result.images) <= 4


def test_what_it_cannot_do_is_refused_with_the_reason() -> None:
    model = network()
    assert SHORT.why_not(model, SGD, "weights", 4) is None
    assert SHORT.why_not(model, ADAM, "weights", 4) is None
    assert "adam" in (SHORT.why_not(model, replace(ADAM, local_steps=2), "weights", 4) or "")
    assert "recipe is withheld" in (SHORT.why_not(model, None, "weights", 4) or "")
    lenet = build_model("lenet_idlg", image_shape=(1, 12, 12), task=SingleLabel(3), generator=torch.Generator())
    assert "no two dense layers" in (SHORT.why_not(lenet, SGD, "weights", 4) or "")
    view = ServerView(model, SGD, "weights", Plain(), 1, "malicious_server", frozenset())
    with pytest.raises(AttackFailure, match="auxiliary"):
        SHORT.prepare(view, torch.Generator())
