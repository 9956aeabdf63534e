"""How updates reach the server, and what of them can be seen on the way."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from pydantic.dataclasses import dataclass

from medpfl.core.config import STRICT
from medpfl.core.domain import Update
from medpfl.core.errors import SpecError
from medpfl.core.registry import Registry


class Channel(ABC):
    """Base of all channels: a frozen keyword-only configuration."""

    reveals_individual_updates: ClassVar[bool]
    """Whether somebody who listens sees the update of a single client."""

    bytes_per_entry: ClassVar[int] = 0
    """Bytes at the peak per entry of an update that it takes besides the updates themselves."""

    chosen_by_server: ClassVar[frozenset[str]] = frozenset()
    """Parameters that clients take from the server's message, so that a malicious one may choose them."""

    @property
    def client_count(self) -> int:
        """How many clients' updates arrive as one."""
        return 1

    @property
    def scored_clients(self) -> int:
        """How many of the clients are scored, the victim first."""
        return 1

    def done(self) -> str:
        """What it does to updates, as plain sentences for the report; empty where it does nothing."""
        return ""

    def told(self, parameters: Mapping[str, float]) -> Channel:
        """The same channel with what the server told clients. Raises SpecError for what it does not choose."""
        if not parameters:
            return self
        if beyond := set(parameters) - self.chosen_by_server:
            raise SpecError(f"the server does not choose {', '.join(sorted(beyond))} of the channel")
        return replace(self, **parameters)  # type: ignore[type-var]

    def fitted(self, largest: float, examples: int) -> Mapping[str, float]:
        """What a server tells clients so that values up to `largest` of a client with so many images come through best.

        Only what it chooses (`chosen_by_server`); nothing by default.
        """
        return {}

    def warnings(self, examples: int) -> tuple[str, ...]:
        """Sentences that must stand beside every result where clients hold so many images."""
        return ()

    @abstractmethod
    def send(self, updates: Iterable[Update], generator: torch.Generator) -> Update:
        """What the adversary receives when these clients send their updates; the victim's comes first.

        Every tensor is treated on its own. The updates are taken one after the other, and none is kept.
        """


CHANNELS: Registry[type[Channel]] = Registry("channel")


@CHANNELS.register("plain", summary="every update is sent as it is and can be seen by server and eavesdropper")
@dataclass(frozen=True, kw_only=True, config=STRICT)
class Plain(Channel):
    """One client's update, as it is."""

    reveals_individual_updates = True

    def send(self, updates: Iterable[Update], generator: torch.Generator) -> Update:
        """The update itself; raises `ValueError` unless there is exactly one."""
        (update,) = updates
        return update


PLAIN = Plain()
