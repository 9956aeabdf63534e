"""The gate's search: attacks with a small budget read the client's own update, as a server without the images would."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medpfl.attacks import ATTACKS
from medpfl.attacks.base import Attack
from medpfl.core.domain import Failure, Observation
from medpfl.core.errors import SpecError
from medpfl.core.session import NO_SESSION
from medpfl.federation.guarding import Trained
from medpfl.guards.comparison import image_space
from medpfl.guards.self_test import Thresholds

SEED = 0
"""Of the attacks' starts, so that the same update gets the same verdict."""


@dataclass(frozen=True)
class Searched:
    """What one attack gave back. returned: places of the images that came back; None where it could not be run."""

    attack: str
    returned: Tensor | None
    evaluations: int = 0
    why_not: str = ""


def searching_attacks(names: Sequence[str]) -> dict[str, Attack]:
    """The named attacks with their quick settings. Raises SpecError where one is unknown or needs what a server lacks."""
    found: dict[str, Attack] = {}
    for name in names:
        if name not in ATTACKS.names():
            raise SpecError(f"attacks: found {name!r}, expected names of attacks (`medpfl list attacks`)")
        kind = ATTACKS[name].item
        attack = kind(**kind.presets.get("quick", {}))
        lacking = sorted(attack.requires() | attack.needs())
        if lacking:
            raise SpecError(
                f"attacks: {name} needs {', '.join(lacking)}, which an honest server does not have; choose another"
            )
        found[name] = attack
    return found


def search(trained: Trained, names: Sequence[str], thresholds: Thresholds) -> Iterator[Searched]:
    """Runs each attack once on the update and compares what it gives with the client's own images.

    An image has come back where one picture reaches the thresholds for it, whatever the picture's brightness and
    contrast. An attack sees model, update and recipe, and no label.
    """
    received, update = trained.received, trained.update
    observation = Observation(received.model, update, received.recipe, "client")
    for name, attack in searching_attacks(names).items():
        reason = attack.why_not(received.model, received.recipe, update.kind, update.examples)
        if reason is not None:
            yield Searched(name, None, why_not=reason)
            continue
        outcome = attack.reconstruct([observation], [torch.Generator().manual_seed(SEED)], NO_SESSION)[0]
        if isinstance(outcome, Failure):
            yield Searched(name, None, why_not=outcome.reason)
        else:
            returned = _returned(outcome.images, received.batch.images, thresholds)
            yield Searched(name, returned, outcome.gradient_evaluations)


def _returned(pictures: Tensor, images: Tensor, thresholds: Thresholds) -> Tensor:
    """Places of the images (N, C, H, W) that one of the pictures (M, C, H, W) shows."""
    if not len(pictures) or not len(images):
        return torch.zeros(0, dtype=torch.int64)
    own = images.flatten(1).double()
    space = image_space(own)
    match, psnr = space.compared(pictures.flatten(1).double(), space.prepared(own))
    shown = (match >= thresholds.correlation) & (psnr >= thresholds.psnr)
    return shown.any(dim=0).nonzero().flatten()
