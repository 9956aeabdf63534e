"""How many candidates are computed together: as many as fit the memory that a search may take, by measurement."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from medpfl.core.memory import budget, peak_bytes

CANDIDATES_AT_ONCE = 64
"""At most so many on the CPU, whose caches more would only thrash."""

CANDIDATES_AT_ONCE_ON_GPU = 1024

MARGIN = 1.25
"""What libraries use inside single operations, which is not measured, as a factor on all that is."""


def most_at_once(device: torch.device) -> int:
    """Candidates beyond which more at once make nothing faster."""
    return CANDIDATES_AT_ONCE if device.type == "cpu" else CANDIDATES_AT_ONCE_ON_GPU


def fitting(evaluate: Callable[[int], object], device: torch.device, most: int, *, beside: int = 0) -> int:
    """The number of candidates, at least one and at most `most`, whose evaluation stays within the memory budget.

    evaluate: computes that many candidates. It is measured with one and with two, so that what all share and what each
    adds are told apart. beside: bytes that each candidate holds besides. The measurement counts tensors and the budget
    is part of an audit's plan, so the same search is cut in the same way whenever it is run.

    >>> from medpfl.core.memory import memory_budget
    >>> with memory_budget(1000):
    ...     fitting(lambda count: torch.zeros(count, 25), torch.device("cpu"), 64)
    8
    """
    one, two = (peak_bytes(partial(evaluate, count)) for count in (1, 2))
    each = max(1, two - one)
    shared = max(0, one - each)
    return max(1, min(most, int((budget(device) / MARGIN - shared) // (each + beside))))
