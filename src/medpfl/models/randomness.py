"""Random initialization that neither reads nor changes the global random state."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def isolated_randomness(generator: torch.Generator) -> Iterator[None]:
    """Inside, PyTorch's global CPU generator is seeded from `generator`; afterwards it is as it was before.

    >>> before = torch.get_rng_state()
    >>> with isolated_randomness(torch.Generator().manual_seed(0)):
    ...     _ = torch.rand(3)
    >>> bool((torch.get_rng_state() == before).all())
    True
    """
    seed = int(torch.randint(2**62, (), generator=generator))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
