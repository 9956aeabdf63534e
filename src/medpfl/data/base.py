"""What a reader is: a frozen configuration that turns files into samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TypeVar

from medpfl.core.domain import Sample
from medpfl.core.registry import Registry

UNLABELED = "unlabeled"
"""The class of images that come without labels."""

Label = int | tuple[int, ...]
"""A class index or, for multi-label data, a tuple of 0/1 per class."""

T = TypeVar("T")


class Reader(ABC):
    """Base of all readers: where the files are and how they are read, no state.

    A subclass is decorated with `pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)` and
    registered with `@READERS.register("name", summary=..., limits=...)`. A reader of files has a field `path`.
    """

    @abstractmethod
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes in the order of the labels; ("unlabeled",) for data without labels."""

    @abstractmethod
    def read(self, maximum: int | None = None) -> Iterator[Sample]:
        """Images at their native size, in an order that depends on the files' names only.

        Each is float32 (C, *spatial) in [0, 1], and has a mask (*spatial) where there are `mask_names`. `maximum` bounds their number: the kept ones are spread evenly over
        the classes and, within a class, over the reading order. Raises DataError that names the file.
        """

    def mask_names(self) -> tuple[str, ...]:
        """Names of the classes of the masks, the background first; none for data without masks."""
        return ()

    @property
    def multi_label(self) -> bool:
        """Whether an image can have any number of classes."""
        return False

    def notes(self) -> tuple[str, ...]:
        """What the reader leaves out, in plain sentences, without patient text."""
        return ()


READERS: Registry[type[Reader]] = Registry("reader")


def spread_evenly(classes: Sequence[object], maximum: int | None) -> list[int]:
    """Sorted positions of at most `maximum` entries, as equal in number per class as can be, evenly spaced in each.

    >>> spread_evenly(["a", "a", "a", "a", "b", "b"], 4)
    [1, 3, 4, 5]
    """
    positions: dict[object, list[int]] = {}
    for position, name in enumerate(classes):
        positions.setdefault(name, []).append(position)
    if maximum is None or maximum >= len(classes):
        return list(range(len(classes)))
    chosen: list[int] = []
    left = maximum
    groups = sorted(positions.values(), key=len)
    for done, group in enumerate(groups):
        quota = min(len(group), left // (len(groups) - done))
        chosen += [group[(2 * step + 1) * len(group) // (2 * quota)] for step in range(quota)]
        left -= quota
    return sorted(chosen)


def pick(entries: Sequence[T], classes: Sequence[object], maximum: int | None) -> list[T]:
    """The entries at the positions that `spread_evenly` gives."""
    return [entries[position] for position in spread_evenly(classes, maximum)]
