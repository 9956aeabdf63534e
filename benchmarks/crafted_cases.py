"""The attacks that `crafted_relatives.py` compares, one entry each, and how much of a round each can read at most."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medpfl.attacks.ares import Ares
from medpfl.attacks.brightness_bins import alone, brightness
from medpfl.attacks.crafted import CraftedAttack
from medpfl.attacks.curious_abandon_honesty import CuriousAbandonHonesty
from medpfl.attacks.fishing import Fishing
from medpfl.attacks.latent_bins import hidden_layer, latents
from medpfl.attacks.linear_queries import query_values
from medpfl.attacks.loki import Loki
from medpfl.attacks.medleak import MedLeak
from medpfl.attacks.robbing_the_fed import RobbingTheFed
from medpfl.attacks.scale_mia import ScaleMia, ceiling
from medpfl.attacks.trap_weights import readable
from medpfl.core.domain import Broadcast, GlobalModel
from medpfl.core.seeding import generator
from medpfl.data import Dataset
from medpfl.models import build_model, prepare
from medpfl.models.cnn import PoolingNet


def multinomial(images: int, units: int) -> float:
    """Expected share of images that are alone in one of so many bins of equal mass."""
    return float((1 - 1 / units) ** (images - 1))


def one_of_a_class(images: int, _units: int) -> float:
    """Expected share of images that are the only one of the likeliest of six equally frequent classes: one or none."""
    return float((5 / 6) ** (images - 1) / 6)


def alone_by_brightness(broadcast: Broadcast, images: Tensor) -> Tensor:
    """Images alone in their brightness bin."""
    return alone(brightness(images), broadcast.secret["edges"].flatten())


def alone_by_query(broadcast: Broadcast, images: Tensor) -> Tensor:
    """Images alone in their bin of the imprint's query."""
    return alone(query_values(images, broadcast.secret["query"]), broadcast.secret["edges"])


def alone_in_a_unit(layer: str) -> Callable[[Broadcast, Tensor], Tensor]:
    """Images that are the only active ones in some unit of that layer, which sees the pixels."""

    def count(broadcast: Broadcast, images: Tensor) -> Tensor:
        parameters = broadcast.model(0).parameters
        values = images.double().flatten(1) @ parameters[f"{layer}.weight"].double().T
        return readable(values + parameters[f"{layer}.bias"].double() > 0)

    return count


def lenet(data: Dataset, _units: int, seed: int) -> GlobalModel:
    """An untrained LeNet."""
    shape = tuple(data.images.shape[1:])
    return build_model("lenet_idlg", image_shape=shape, task=data.task, generator=generator("net", seed))


def dense_net(data: Dataset, units: int, seed: int) -> GlobalModel:
    """An untrained net of two dense layers with ReLU between them."""
    shape = tuple(data.images.shape[1:])
    torch.manual_seed(seed)
    inputs = torch.Size(shape).numel()
    module = nn.Sequential(nn.Flatten(), nn.Linear(inputs, units), nn.ReLU(), nn.Linear(units, data.task.classes))
    return prepare(module, name="dense", image_shape=shape, task=data.task)


def convolutional_net(channels: int) -> Callable[[Dataset, int, int], GlobalModel]:
    """Builds an untrained net of two convolutions of so many channels, without pooling, and two dense layers."""

    def build(data: Dataset, units: int, seed: int) -> GlobalModel:
        shape = tuple(data.images.shape[1:])
        torch.manual_seed(seed)
        module = nn.Sequential(
            nn.Conv2d(shape[0], channels, 5, padding=2), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(channels * shape[1] * shape[2], units), nn.ReLU(), nn.Linear(units, data.task.classes),
        )  # fmt: skip
        return prepare(module, name="convolutional", image_shape=shape, task=data.task)

    return build


def pooling_net(data: Dataset, units: int, seed: int) -> GlobalModel:
    """The untrained CNN of FedAvg, its dense layer as wide as there are units."""
    shape = tuple(data.images.shape[1:])
    torch.manual_seed(seed)
    module = PoolingNet(shape, data.task.classes, widths=(32, 64), kernel=5, hidden=units)
    return prepare(module, name="cnn_fedavg", image_shape=shape, task=data.task)


def alone_within_clients(broadcast: Broadcast, images: Tensor) -> Tensor:
    """Images alone in their brightness bin among those of their own client."""
    clients = torch.split(images, len(images) // len(broadcast.models))
    return torch.cat([alone_by_brightness(broadcast, own) for own in clients])


def first_in_their_bin(broadcast: Broadcast, images: Tensor, steps: int) -> Tensor:
    """Images alone in their bin among those of their own client's steps up to their own: a unit that has learned from
    one image may have moved so far that later ones leave no trace.
    """
    clients = torch.split(images, len(images) // len(broadcast.models))
    batch = len(clients[0]) // steps
    parts = [
        alone_by_brightness(broadcast, own[: end * batch])[-batch:] for own in clients for end in range(1, steps + 1)
    ]
    return torch.cat(parts)


def first_in_their_bin_expected(images: int, units: int, steps: int) -> float:
    """The expected share of these images."""
    return sum(multinomial(images // steps * end, units) for end in range(1, steps + 1)) / steps


def alone_by_latent(broadcast: Broadcast, images: Tensor) -> Tensor:
    """Images whose mean latent is alone in its bin."""
    model = broadcast.model(0)
    layer = hidden_layer(model)
    assert not isinstance(layer, str)
    return alone(latents(model, layer, images).double().mean(dim=1), broadcast.secret["edges"])


def alone_and_decoded(broadcast: Broadcast, images: Tensor) -> Tensor:
    """Those of them that the decoder gives back above 30 dB from their true latents."""
    errors = (ceiling(broadcast, images) - images).square().flatten(1).mean(dim=1)
    return alone_by_latent(broadcast, images) & (errors < 1e-3)


@dataclass(frozen=True)
class Case:
    """An attack in the table.

    attack: from the number of units. after: whose images it is after, the victim's or all clients'. channels: where it
    is run. at_most: which of the images (n, ...) that it is after can be read at most, from what the server sent.
    closed_form: the expected share of them, from the number of images and of units. apart: whether every client has bins of its own, so that only its own images share them. data: the sets it is
    run on, all if empty. net: builds the agreed model from the data, the number of units and a seed.
    """

    label: str
    attack: Callable[[int], CraftedAttack]
    after: str = "all"
    channels: tuple[str, ...] = ("plain", "secure_sum", "secagg_plus")
    at_most: Callable[[Broadcast, Tensor], Tensor] | None = None
    closed_form: Callable[[int, int], float] | None = None
    apart: bool = False
    data: tuple[str, ...] = ()
    net: Callable[[Dataset, int, int], GlobalModel] = lenet


FRONT = alone_in_a_unit("front.first")
CASES = (
    Case(
        "medleak separate, one query",
        lambda k: MedLeak(bins=k, queries=1),
        "victim",
        at_most=alone_by_brightness,
        closed_form=multinomial,
    ),
    Case("medleak separate, several queries", lambda k: MedLeak(bins=k), "victim"),
    Case(
        "medleak joint, one query",
        lambda k: MedLeak(bins=k, queries=1, mode="joint"),
        channels=("secure_sum", "secagg_plus"),
        at_most=alone_by_brightness,
        closed_form=multinomial,
    ),
    Case(
        "robbing_the_fed cumulative",
        lambda k: RobbingTheFed(bins=k),
        at_most=alone_by_query,
        closed_form=multinomial,
    ),
    Case(
        "robbing_the_fed sparse",
        lambda k: RobbingTheFed(bins=k, variant="sparse"),
        at_most=alone_by_query,
        closed_form=multinomial,
    ),
    Case(
        "robbing_the_fed sparse dct",
        lambda k: RobbingTheFed(bins=k, variant="sparse", query="dct"),
        at_most=alone_by_query,
        closed_form=multinomial,
    ),
    Case(
        "robbing_the_fed sparse random",
        lambda k: RobbingTheFed(bins=k, variant="sparse", query="random"),
        at_most=alone_by_query,
        closed_form=multinomial,
    ),
    Case(
        "robbing_the_fed published",
        lambda k: RobbingTheFed(**{**RobbingTheFed.presets["published"], "bins": k}),
        at_most=alone_by_query,
        closed_form=multinomial,
    ),
    Case(
        "curious_abandon_honesty thresholds, peeling",
        lambda k: CuriousAbandonHonesty(units=k, read="peeling"),
        at_most=FRONT,
    ),
    Case("curious_abandon_honesty thresholds", lambda k: CuriousAbandonHonesty(units=k), at_most=FRONT),
    Case(
        "curious_abandon_honesty factor, independent",
        lambda k: CuriousAbandonHonesty(units=k, tuning="factor"),
        at_most=FRONT,
    ),
    Case(
        "curious_abandon_honesty factor, mirrored",
        lambda k: CuriousAbandonHonesty(units=k, tuning="factor", signs="mirrored"),
        at_most=FRONT,
    ),
    Case(
        "curious_abandon_honesty own layer, peeling",
        lambda _: CuriousAbandonHonesty(place="own", read="peeling"),
        at_most=alone_in_a_unit("1"),
        net=dense_net,
    ),
    Case(
        "curious_abandon_honesty published, own layer",
        lambda _: CuriousAbandonHonesty(**CuriousAbandonHonesty.presets["published"]),
        at_most=alone_in_a_unit("1"),
        net=dense_net,
    ),
    Case("fishing class, gradinv", lambda _: Fishing(), "victim", closed_form=one_of_a_class, data=("bodyparts",)),
    Case(
        "fishing class, dlg", lambda _: Fishing(search="dlg"), "victim", closed_form=one_of_a_class, data=("bodyparts",)
    ),
    Case(
        "loki",
        lambda k: Loki(bins=k),
        channels=("secure_sum", "secagg_plus"),
        at_most=alone_within_clients,
        closed_form=multinomial,
        apart=True,
    ),
    Case(
        "loki, brightness from the bin",
        lambda k: Loki(bins=k, brightness="bin"),
        channels=("secure_sum", "secagg_plus"),
        at_most=alone_within_clients,
        closed_form=multinomial,
        apart=True,
    ),
    Case(
        "loki published",
        lambda k: Loki(**{**Loki.presets["published"], "bins": k}),
        channels=("secure_sum", "secagg_plus"),
        at_most=alone_within_clients,
        closed_form=multinomial,
        apart=True,
    ),
    *(
        Case(
            f"ares {solver}, {channels} channels",
            lambda _, solver=solver: Ares(solver=solver),
            at_most=alone_by_latent,
            closed_form=multinomial,
            net=convolutional_net(channels),
        )
        for channels in (12, 2)
        for solver in ("sparse", "least_squares")
    ),
    Case(
        "scale_mia",
        lambda _: ScaleMia(),
        at_most=alone_and_decoded,
        closed_form=multinomial,
        net=pooling_net,
    ),
    Case(
        "scale_mia, encoder as sent",
        lambda _: ScaleMia(encoder="as_sent"),
        at_most=alone_and_decoded,
        closed_form=multinomial,
        net=pooling_net,
    ),
)
