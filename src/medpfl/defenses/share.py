"""Fewer tensors: frozen layers are not trained, and what is named is all that is sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from medpfl.core.config import STRICT
from medpfl.core.domain import ClientState, GlobalModel, Recipe, Update
from medpfl.core.mechanisms import Mechanism, Shared, named_like, sent_names
from medpfl.defenses.base import DEFENSES, Defense


@DEFENSES.register(
    "share",
    summary="batch-norm buffers stay at the client, only named tensors are sent, named layers are frozen",
    paper="buffers: Li et al.: FedBN, ICLR 2021 (arXiv 2102.07623); head only: Collins et al.: FedRep, ICML 2021",
    limits="the head alone still shows the features of its input exactly (feature_readout), and what is sent is sent as "
    "it is; the server's running statistics stay as they were; no privacy guarantee",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class Share(Defense):
    """Tensors are named by patterns such as `fc.*` or `*.bias`. Clients train all but frozen tensors, whatever they send."""

    adaptive_attack: ClassVar[Mapping[str, Any]] = {"name": "idlg", "distance": "likelihood", "total_variation": 1e-2}

    buffers: Annotated[bool, Field(description="whether batch-norm buffers and counters are sent")] = False
    tensors: Annotated[
        tuple[str, ...] | None, Field(description="patterns of the trainable tensors that are sent; by default all")
    ] = None
    frozen: Annotated[
        tuple[str, ...], Field(description="patterns of the tensors that are neither trained nor sent")
    ] = ()

    def model(self, model: GlobalModel) -> GlobalModel:
        """The model with frozen tensors as constants."""
        return model.training_only([name for name in model.parameters if not named_like(name, self.frozen)])

    def update(
        self, update: Update, model: GlobalModel, state: ClientState, generator: torch.Generator
    ) -> tuple[Update, ClientState]:
        """The update with nothing in it but what is sent."""
        sent = sent_names(self.mechanism(), update.trainable)
        update = replace(update, trainable={name: update.trainable[name] for name in sent})
        return (update if self.buffers else replace(update, buffers={}, counters={})), state

    def mechanism(self) -> Mechanism:
        """What is sent."""
        return Shared(self.buffers, self.tensors, self.frozen)

    def refusals(self, model: GlobalModel, recipe: Recipe) -> list[str]:
        """Patterns without a tensor, and nothing left to train or to send."""
        names = [*model.parameters, *model.constants]
        problems = [
            f"{key}: no trainable tensor of '{model.name}' is named like '{pattern}'; it has {', '.join(names[:6])}, ..."
            for key, patterns in (("tensors", self.tensors or ()), ("frozen", self.frozen))
            for pattern in patterns
            if not any(named_like(name, [pattern]) for name in names)
        ]
        trained = [name for name in model.parameters if not named_like(name, self.frozen)]
        if not trained:
            problems.append("frozen: nothing is left to train; name fewer tensors")
        elif not problems and self.tensors is not None and not sent_names(self.mechanism(), trained):
            problems.append("tensors: all that would be sent is frozen; send a tensor that is trained")
        return problems

    def warnings(self) -> tuple[str, ...]:
        """No guarantee."""
        return (
            "Sending fewer tensors bounds nothing about those that are sent: there is no formal guarantee, and what is "
            "measured holds for the audited attacks only",
        )
