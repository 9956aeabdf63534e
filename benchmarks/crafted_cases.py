"""The attacks that `crafted_relatives.py` compares, one entry each, and how much of a round each can read at most."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medpfl.attacks.brightness_bins import alone, brightness
from medpfl.attacks.crafted import CraftedAttack
from medpfl.attacks.curious_abandon_honesty import CuriousAbandonHonesty
from medpfl.attacks.fishing import Fishing
from medpfl.attacks.linear_queries import query_values
from medpfl.attacks.loki import Loki
from medpfl.attacks.medleak import MedLeak
from medpfl.attacks.robbing_the_fed import RobbingTheFed
from medpfl.attacks.trap_weights import readable
from medpfl.core.domain import Broadcast, GlobalModel
from medpfl.core.seeding import generator
from medpfl.data import Dataset
from medpfl.models import build_model, prepare


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


@dataclass(frozen=True)
class Case:
    """An attack in the table.

    attack: from the number of units. after: whose images it is after, the victim's or all clients'. channels: where it
    is run. at_most: which of the images (n, ...) that it is after can be read at most, from what the server sent.
    closed_form: the expected share of them, from the number of images and of units. data: the sets it is run on, all if empty. net: builds the agreed model from the data, the number of units and a seed.
    """

    label: str
    attack: Callable[[int], CraftedAttack]
    after: str = "all"
    channels: tuple[str, ...] = ("plain", "secure_sum", "secagg_plus")
    at_most: Callable[[Broadcast, Tensor], Tensor] | None = None
    closed_form: Callable[[int, int], float] | None = None
    data: tuple[str, ...] = ()
    net: Callable[[Dataset, int, int], GlobalModel] = lenet


FRONT = alone_in_a_unit("front.first")
CASES = (
    Case("medleak separate", lambda k: MedLeak(bins=k, queries=1), "victim", at_most=alone_by_brightness, closed_form=multinomial),
    Case(
        "medleak joint",
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
    Case("fishing class, gradinv", lambda _: Fishing(), "victim", closed_form=one_of_a_class, data=("bodyparts",)),
    Case(
        "fishing class, dlg", lambda _: Fishing(search="dlg"), "victim", closed_form=one_of_a_class, data=("bodyparts",)
    ),
    Case("loki", lambda k: Loki(bins=k), channels=("secure_sum", "secagg_plus"), closed_form=None),
)
