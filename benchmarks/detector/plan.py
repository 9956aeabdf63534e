"""Which runs there are: honest ones, crafted ones, and attackers who know the checks."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from detector.adaptive import GRAY, adaptive_round
from detector.crafted import FAMILIES, crafted_round
from detector.data import sources
from detector.forms import TRICKS
from detector.honest import STAGES, VARIANT_MAKERS, honest_round
from detector.nets import OWN
from detector.rows import Row, written
from detector.scores import Scores, scored
from medpfl.attacks import ATTACKS
from medpfl.core.domain import GlobalModel
from medpfl.core.seeding import generator
from medpfl.models import MODELS

ZOO = ("lenet_dlg", "lenet_idlg", "lenet_cpl", "cnn_fedavg", "cnn3", "unet_small")
ZOO_SLOW = ("resnet18", "resnet18_cifar", "vit", "densenet121", "efficientnet_b0")
"""Every sixth run only."""

MASKED = ("chest_drawn", "brain_drawn", "skin_drawn")

FEW = ("brain",)
"""Sets with too few images to leave a server some of its own."""

CRAFTED_RUNS = {"medleak": 60, "robbing_the_fed": 60, "curious_front": 45, "curious_own": 30, "loki": 40}
OTHER_CRAFTED_RUNS = 40
ADAPTIVE_SEEDS = 4


@dataclass(frozen=True)
class Planned:
    """One run of the plan; its id is all that its randomness depends on."""

    kind: str
    group: str
    number: int
    stage: str = ""
    variant: str = ""
    strength: float = 0.0

    @property
    def run(self) -> str:
        """The id."""
        parts = [self.kind, self.group, self.stage, self.variant, f"{self.strength:g}" if self.strength else ""]
        return "-".join([part for part in parts if part] + [str(self.number)])


def planned(repeats: int, first: int = 0) -> Iterator[Planned]:
    """All runs, the honest ones so many times; `first` is the number of the first repeat, for fresh runs."""
    for number in range(first, first + repeats):
        for group in (*ZOO, *OWN, *(name for name in ZOO_SLOW if _there(name))):
            for place, (stage, variant) in enumerate((one, two) for one in STAGES for two in VARIANT_MAKERS):
                if group not in ZOO_SLOW or place % 6 == number % 6:
                    yield Planned("honest", group, number, stage, variant)
        for group, family in FAMILIES.items():
            if family.attack in {entry.name for entry in ATTACKS}:
                count = CRAFTED_RUNS.get(group, OTHER_CRAFTED_RUNS)
                for place in range(count):
                    yield Planned("crafted", group, number * count + place)
        for group, trick in TRICKS.items():
            for strength in trick.strengths:
                for place in range(ADAPTIVE_SEEDS):
                    yield Planned("adaptive", group, number * ADAPTIVE_SEEDS + place, strength=strength)


def measured(one: Planned, folder: Path | None) -> Row:
    """Carries one run out."""
    own = generator("guards", one.run)
    names = [name for name in sources(folder) if one.kind == "honest" or name not in FEW]
    names = [name for name in names if one.kind != "adaptive" or name in GRAY]
    names = list(MASKED) if one.group == "unet_small" else names
    data = names[int(torch.randint(len(names), (), generator=own))]
    if one.kind == "honest":
        held = honest_round(one.group, one.stage, one.variant, data, folder, own)
        found, _ = scored(held, own)
        return _row(
            one, data, len(held.batch), held.model, f"{one.stage} {one.variant} {held.recipe.default_id}", found, 0.0
        )
    if one.kind == "crafted":
        crafted = crafted_round(one.group, data, folder, own)
        found, update = scored(crafted.round, own)
        share = crafted.recovered(update, own)
        return _row(one, data, len(crafted.round.batch), crafted.round.model, crafted.detail, found, share)
    adaptive = adaptive_round(one.group, one.strength, data, folder, own)
    found, update = scored(adaptive.round, own)
    share = adaptive.recovered(update)
    return _row(one, data, len(adaptive.round.batch), adaptive.round.model, adaptive.detail, found, share)


def _row(one: Planned, data: str, images: int, model: GlobalModel, detail: str, found: Scores, share: float) -> Row:
    return Row(
        run=one.run,
        kind=one.kind,
        group=one.group,
        body=model.name,
        detail=detail,
        strength=one.strength,
        data=data,
        images=images,
        structure=found.structure,
        behavior=found.behavior,
        gate=found.gate,
        agreed=found.agreed,
        reference=found.reference,
        recovered=round(share, 4),
        times=" ".join(f"{seconds:.2f}" for seconds in found.seconds),
        scores=written(dict(found.values)),
    )


def _there(name: str) -> bool:
    return find_spec("monai") is not None or name not in ("densenet121", "efficientnet_b0")


assert set(ZOO) | set(ZOO_SLOW) <= {entry.name for entry in MODELS}
