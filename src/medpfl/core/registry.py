"""One registry with name -> entry, used for attacks, defenses, models, readers, channels, metrics and threat models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from medpfl.core.errors import SpecError, suggestion

T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Entry(Generic[T]):
    """A registered thing and what `medpfl describe` says about it."""

    name: str
    item: T
    summary: str
    paper: str = ""
    limits: str = ""


class Registry(Generic[T]):
    """Names of one kind. Duplicates are refused; unknown names raise with the nearest known one, planned ones say so.

    >>> numbers: Registry[int] = Registry("number")
    >>> numbers.add("one", 1, summary="the first")
    1
    >>> numbers["one"].item
    1
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, Entry[T]] = {}

    def add(self, name: str, item: U, *, summary: str, paper: str = "", limits: str = "") -> U:
        """Registers `item` under `name` and returns it."""
        if name in self._entries:
            raise ValueError(f"{self.kind} '{name}' is registered twice")
        self._entries[name] = Entry(name, item, summary, paper, limits)  # type: ignore[arg-type]
        return item

    def register(self, name: str, *, summary: str, paper: str = "", limits: str = "") -> Callable[[U], U]:
        """Decorator form of `add`, for classes and factories."""

        def decorate(item: U) -> U:
            return self.add(name, item, summary=summary, paper=paper, limits=limits)

        return decorate

    def __getitem__(self, name: str) -> Entry[T]:
        try:
            return self._entries[name]
        except KeyError:
            raise SpecError(self.why_missing(name)) from None

    def why_missing(self, name: str) -> str:
        """What to tell somebody who asks for a name that is not registered."""
        return f"unknown {self.kind} '{name}': {suggestion(name, self._entries)}"

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[Entry[T]]:
        return iter(sorted(self._entries.values(), key=lambda entry: entry.name))

    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted(self._entries)
