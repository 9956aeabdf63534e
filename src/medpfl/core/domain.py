"""The words of the project as types. Images are (N, C, *spatial) in [0, 1] everywhere outside a model."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from medpfl.core.knowledge import CAPABILITIES, KNOWLEDGE, ORACLES, Auxiliary, Knowledge
from medpfl.core.recipes import Recipe, UpdateKind
from medpfl.core.tasks import Task

__all__ = [
    "CAPABILITIES",
    "KNOWLEDGE",
    "ORACLES",
    "Auxiliary",
    "Batch",
    "Broadcast",
    "ClientState",
    "Failure",
    "GlobalModel",
    "Knowledge",
    "Observation",
    "Recipe",
    "Reconstruction",
    "Sample",
    "Tensors",
    "Update",
    "UpdateKind",
]

Tensors = Mapping[str, Tensor]
"""Named tensors, in the order of the module."""


@dataclass(frozen=True)
class Sample:
    """One image as a reader gives it: (C, *spatial) float32 in [0, 1], with its label and pseudonymous item name.

    `label` is a class index or, for multi-label data, a tuple of 0/1 per class. `mask` holds a class per pixel, int64
    (*spatial), where the data has masks. `patient` and `site` are opaque keys
    that are used for splitting only and never leave the process.
    """

    image: Tensor
    label: int | tuple[int, ...]
    item: str
    patient: str | None = None
    site: str | None = None
    mask: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """Images (N, C, *spatial) in [0, 1] and targets of the model's task: int64 (N,), float (N, classes), or masks."""

    images: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return int(self.images.shape[0])


@dataclass(frozen=True)
class GlobalModel:
    """What the server sends in a round: architecture, trainable tensors, buffers and counters, and the task.

    `module` is a template whose own tensors are never used or changed: every forward pass is functional. Its batch
    norm layers must be in the functional form of `medpfl.models` (see `medpfl.models.prepare`), which assigns new
    running statistics instead of writing in place; `torch.func.functional_call` hands assigned buffers back.
    `constants` are frozen tensors and others that clients neither train nor send.
    """

    name: str
    module: nn.Module
    parameters: Tensors
    buffers: Tensors
    counters: Tensors
    task: Task
    image_shape: tuple[int, ...]
    constants: Tensors = field(default_factory=dict)

    def forward(
        self,
        images: Tensor,
        *,
        parameters: Tensors | None = None,
        buffers: Tensors | None = None,
        batch_norm: Literal["train", "eval"] = "eval",
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Runs the model: images (N, C, *spatial) in [0, 1] -> (output, new floating buffers).

        The output is (N, classes), or (N, classes, *spatial) of a segmentation model.

        Pure and differentiable in images, parameters and buffers. `batch_norm` switches batch-norm layers only;
        dropout is always off.
        """
        state: dict[str, Tensor] = dict(self.parameters if parameters is None else parameters)
        state.update(self.buffers if buffers is None else buffers)
        state.update(self.counters)
        state.update(self.constants)
        for layer in self._batch_norm_layers:
            layer.training = batch_norm == "train"
        output = functional_call(self.module, state, (images,))
        return output, {name: state[name] for name in self.buffers}

    @cached_property
    def _batch_norm_layers(self) -> list[nn.Module]:
        return [layer for layer in self.module.modules() if getattr(layer, "functional_batch_norm", False)]

    @property
    def device(self) -> torch.device:
        """Where the tensors live (`medpfl.core.devices.moved` puts them elsewhere)."""
        return next(iter(self.parameters.values())).device

    @property
    def parameter_count(self) -> int:
        """Number of trainable entries."""
        return sum(tensor.numel() for tensor in self.parameters.values())

    def training_only(self, names: Collection[str]) -> GlobalModel:
        """The same model with all trainable tensors but these as constants; itself where these are all."""
        fixed = {name: tensor for name, tensor in self.parameters.items() if name not in names}
        if not fixed:
            return self
        trained = {name: tensor for name, tensor in self.parameters.items() if name in names}
        return replace(self, parameters=trained, constants={**self.constants, **fixed})

    def to(self, dtype: torch.dtype) -> GlobalModel:
        """The same model with trainable tensors, floating buffers and floating constants in another precision."""
        floating = {name: tensor.to(dtype) for name, tensor in self.constants.items() if tensor.is_floating_point()}
        return replace(
            self,
            parameters={name: tensor.to(dtype) for name, tensor in self.parameters.items()},
            buffers={name: tensor.to(dtype) for name, tensor in self.buffers.items()},
            constants={**self.constants, **floating},
        )


@dataclass(frozen=True)
class Update:
    """What one client sends: trainable tensors, buffers and counters kept apart.

    `trainable` holds the gradient of the mean loss (`gradient`), new minus old (`delta`) or new tensors (`weights`);
    `buffers` and `counters` hold the new values, and are empty for a `gradient` of a model without batch statistics.
    `examples` is the number of images that the update was computed from, which clients send along.
    """

    kind: UpdateKind
    trainable: Tensors
    buffers: Tensors
    counters: Tensors
    examples: int


@dataclass(frozen=True)
class ClientState:
    """What a client keeps between rounds: counted rounds and named tensors of the defense and the optimizer."""

    rounds: int = 0
    tensors: Tensors = field(default_factory=dict)


@dataclass(frozen=True)
class Broadcast:
    """What the server sends in one round.

    models: one per client, the victim's first; clients beyond the last model get that one, so a single model is sent
    to all. recipe: how clients are told to train in place of the agreed one, None if as agreed. aggregation: parameters
    of the channel that clients are told in place of the agreed ones. secret: what only the server knows about how it made them, empty for an honest one. notes: how they were
    made, in plain sentences.
    """

    models: tuple[GlobalModel, ...]
    secret: Tensors = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    recipe: Recipe | None = None
    aggregation: Mapping[str, float] = field(default_factory=dict)

    def model(self, client: int) -> GlobalModel:
        """What the client with this number gets; 0 is the victim."""
        return self.models[min(client, len(self.models) - 1)]

    def mean_parameters(self, clients: Sequence[int]) -> Tensors:
        """The mean of the trainable tensors that these clients got: what the mean of their new weights is new to."""
        return {name: self.mean_parameter(name, clients) for name in self.models[0].parameters}

    def mean_parameter(self, name: str, clients: Sequence[int]) -> Tensor:
        """One of them."""
        return _mean([self.model(client).parameters[name] for client in clients])


def _mean(tensors: list[Tensor]) -> Tensor:
    """The mean in float64; a tensor that all share as it is, without rounding and without copies."""
    if all(tensor is tensors[0] for tensor in tensors):
        return tensors[0]
    return sum((tensor.double() for tensor in tensors[1:]), tensors[0].double()) / len(tensors)


@dataclass(frozen=True)
class Observation:
    """All that the adversary sees and may know. An attack receives observations and nothing else.

    model: what it sent to the victim, or saw. update: what it received. recipe: how the client trained, None when
    withheld. clients: how many clients the update comes from. broadcast: all that a server sent which prepared it,
    with its secret; None where it sent one model as agreed. senders: the numbers of the clients that sent something,
    where others withheld theirs; None if all did. earlier: what came from the same clients in earlier rounds, the first
    round first, when they had been sent the same and answered with the same images.
    """

    model: GlobalModel
    update: Update
    recipe: Recipe | None
    threat_model: str
    knowledge: Knowledge = field(default_factory=Knowledge)
    clients: int = 1
    broadcast: Broadcast | None = None
    senders: tuple[int, ...] | None = None
    earlier: tuple[Update, ...] = ()

    @property
    def taking_part(self) -> tuple[int, ...]:
        """The numbers of the clients that the update comes from."""
        return tuple(range(self.clients)) if self.senders is None else self.senders

    @property
    def sent_parameters(self) -> Tensors:
        """The trainable tensors that clients got, on average: what `weights` are new to."""
        return self.model.parameters if self.broadcast is None else self.broadcast.mean_parameters(self.taking_part)

    def sent_parameter(self, name: str) -> Tensor:
        """One of them."""
        if self.broadcast is None:
            return self.model.parameters[name]
        return self.broadcast.mean_parameter(name, self.taking_part)

    @property
    def examples(self) -> int:
        """Number of private images that the update says it was computed from."""
        return self.update.examples


@dataclass(frozen=True)
class Reconstruction:
    """What an attack returns for one observation.

    images: (K, C, *spatial) in [0, 1], K <= observation.examples, ranked best first by the attack's own score. None
    (K = 0) where the update showed the attack nothing: that is no failure, and `stop_reason` says why.
    labels: (K,) int64 or (K, classes) float, None if the attack infers none.
    masks: (K, *spatial) int64, a class per pixel, None if the attack finds none (given ones are not repeated).
    objective: the attack's own final objective, NaN without images. trace: (gradient evaluations, objective) pairs.
    gradient_evaluations: model gradient computations spent on this observation, all restarts and line searches.
    unclamped: the same images before clamping, for the papers' legacy metrics only.
    notes: what the attack can tell about why it worked or failed, in plain sentences.
    clients: (K,) int64, which client of an aggregate each image came from, None if the attack does not tell. Equal
    numbers mean the same client; they are the clients' own numbers (0 the victim) unless a note says otherwise, and -1
    where an image could not be attributed.
    """

    images: Tensor
    labels: Tensor | None
    objective: float
    trace: tuple[tuple[int, float], ...]
    gradient_evaluations: int
    stop_reason: str
    unclamped: Tensor | None = None
    notes: tuple[str, ...] = ()
    masks: Tensor | None = None
    clients: Tensor | None = None


@dataclass(frozen=True)
class Failure:
    """An attack broke down on one observation, with the reason. The case fails; others go on."""

    reason: str
