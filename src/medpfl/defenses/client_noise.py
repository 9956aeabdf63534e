"""What the defenses share that clip a client's whole update of a round and add normal noise to it."""

from __future__ import annotations

import torch

from medpfl.core.domain import GlobalModel, Update
from medpfl.core.guarantees import Guarantee, Release
from medpfl.core.mechanisms import Clipped, Composed, GaussianNoise, Mechanism
from medpfl.defenses.clipping import clipped
from medpfl.defenses.noise import normal, with_noise
from medpfl.federation.changes import sent_change, with_change, with_received_statistics

REMARKS = (
    "the number of images that is sent along lies outside the guarantee",
    "buffers and counters are sent as they were received, so they tell nothing",
    "one client in place of another, instead of one whose update is put to zero, changes twice as much",
)


def clipped_and_noisy(
    update: Update, model: GlobalModel, bound: float, std: float, generator: torch.Generator
) -> Update:
    """The change clipped to L2 norm `bound` with Normal(0, std^2) on every entry; no news of buffers and counters."""
    change = clipped(sent_change(update, model.parameters), bound)
    shorter = with_received_statistics(with_change(update, model.parameters, change), model)
    return shorter if std == 0 else with_noise(shorter, normal(std, generator))


def client_mechanism(bound: float, std: float) -> Mechanism:
    """Clipping, then normal noise where there is any."""
    return Clipped(bound) if std == 0 else Composed((Clipped(bound), GaussianNoise(std)))


def client_guarantee(release: Release, *, by_server: bool = False) -> Guarantee:
    """What one round of a client releases about everything that it holds."""
    return Guarantee("client", "zero_out", (release,), "server" if by_server else "client", REMARKS)
