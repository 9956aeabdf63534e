"""What compressing defenses share: they work on the change of the model, and may give back later what they left out."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from medpfl.core.config import STRICT
from medpfl.core.domain import ClientState, GlobalModel, Tensors, Update
from medpfl.core.mechanisms import ErrorFeedback, Mechanism, Scope
from medpfl.defenses.base import Defense
from medpfl.federation.changes import sent_change, with_change

NO_COMPRESSION_GUARANTEE = (
    "Compression leaves out parts of what images say but bounds nothing: there is no formal guarantee, and what is "
    "measured holds for the audited attacks only"
)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Compression(Defense):
    """Base of compressing defenses: m_t = compress(u_t + e_t), e_(t+1) = u_t + e_t - m_t with error feedback, else e = 0.

    u_t is the gradient, or what local training changed; of `weights` the change is compressed, and what is sent is the
    received model plus the message. Buffers and counters are sent as they are (`share` leaves them out). Over rounds
    the messages sum to the updates up to the last residual, so feedback delays leakage and does not prevent it.
    """

    adaptive_attack: ClassVar[Mapping[str, Any]] = {"name": "idlg", "distance": "likelihood", "total_variation": 1e-2}

    error_feedback: Annotated[
        bool, Field(description="whether what a round leaves out is added to the client's next update")
    ] = False

    @abstractmethod
    def compress(
        self, change: Tensors, state: Tensors, generator: torch.Generator
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The message for a change, tensor by tensor of the same shape, and what this method keeps of it.

        state: what it kept in the round before, empty in the first.
        """

    @abstractmethod
    def compressor(self) -> Mechanism:
        """What one compression does."""

    def update(
        self, update: Update, model: GlobalModel, state: ClientState, generator: torch.Generator
    ) -> tuple[Update, ClientState]:
        """The compressed update, and the state with the residual."""
        kept, residual = (_under(state.tensors, f"{type(self).__name__}.{part}/") for part in ("state", "residual"))
        wanted = sent_change(update, model.parameters)
        if residual:
            wanted = {name: tensor + residual[name].to(tensor) for name, tensor in wanted.items()}
        message, kept = self.compress(wanted, kept, generator)
        tensors = {**state.tensors, **_over(kept, f"{type(self).__name__}.state/")}
        if self.error_feedback:
            left = {name: tensor - message[name] for name, tensor in wanted.items()}
            tensors |= _over(left, f"{type(self).__name__}.residual/")
        return with_change(update, model.parameters, message), replace(state, tensors=tensors)

    def mechanism(self) -> Mechanism:
        """What one compression does, with or without feedback."""
        return ErrorFeedback(self.compressor()) if self.error_feedback else self.compressor()

    def warnings(self) -> tuple[str, ...]:
        """No guarantee."""
        return (NO_COMPRESSION_GUARANTEE,)


def by_scope(change: Tensors, scope: Scope) -> Iterator[dict[str, Tensor]]:
    """The groups of tensors within which entries compete: each tensor on its own, or all."""
    if scope == "global":
        yield dict(change)
    else:
        yield from ({name: tensor} for name, tensor in change.items())


def joined(group: Tensors) -> Tensor:
    """All entries of a group as one vector."""
    return torch.cat([tensor.reshape(-1) for tensor in group.values()])


def divided(entries: Tensor, group: Tensors) -> dict[str, Tensor]:
    """A vector of as many entries in the shapes of the group."""
    parts = torch.split(entries, [tensor.numel() for tensor in group.values()])
    return {name: part.reshape(tensor.shape) for (name, tensor), part in zip(group.items(), parts, strict=True)}


def _under(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _over(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
