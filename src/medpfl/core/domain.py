"""The words of the project as types. Images are (N, C, *spatial) in [0, 1] everywhere outside a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as config_dataclass
from torch import Tensor, nn
from torch.func import functional_call

from medpfl.core.config import STRICT
from medpfl.core.mechanisms import Mechanism
from medpfl.core.tasks import Task

Tensors = Mapping[str, Tensor]
"""Named tensors, in the order of the module."""

UpdateKind = Literal["gradient", "delta", "weights"]


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


@config_dataclass(frozen=True, kw_only=True, config=STRICT)
class Recipe:
    """How a client trains on the model that it received, and what it sends."""

    update: Annotated[UpdateKind, Field(description="what is sent: gradient (FedSGD), delta or weights (FedAvg)")] = (
        "gradient"
    )
    batch_size: Annotated[int, Field(ge=1, description="images per local step")] = 1
    local_steps: Annotated[int, Field(ge=1, description="optimizer steps per epoch, each on the next batch")] = 1
    epochs: Annotated[int, Field(ge=1, description="how often the local steps are repeated on the same images")] = 1
    shuffle: Annotated[
        bool, Field(description="every epoch takes the images in a new random order; without, always in the same order")
    ] = False
    images: Annotated[int | None, Field(ge=1, description="private images; default batch_size * local_steps")] = None
    optimizer: Annotated[Literal["sgd", "adam", "adamw"], Field(description="the client's optimizer")] = "sgd"
    learning_rate: Annotated[float, Field(gt=0, description="the client's learning rate")] = 0.01
    momentum: Annotated[float, Field(ge=0, lt=1, description="SGD momentum")] = 0.0
    weight_decay: Annotated[float, Field(ge=0, description="L2 penalty (decoupled for adamw)")] = 0.0
    betas: Annotated[tuple[float, float], Field(description="Adam's moment decay rates")] = (0.9, 0.999)
    epsilon: Annotated[float, Field(gt=0, description="Adam's denominator constant")] = 1e-8
    gradient_clip: Annotated[float | None, Field(gt=0, description="norm bound on each step's batch gradient")] = None
    accumulation: Annotated[int, Field(ge=1, description="micro-batches whose gradients are averaged per step")] = 1
    batch_norm: Annotated[
        Literal["train", "eval"], Field(description="batch statistics (train) or running statistics (eval)")
    ] = "eval"
    precision: Annotated[
        Literal["float32", "float64", "bfloat16", "float16"],
        Field(description="bfloat16 and float16 mean autocast, as a client would run it"),
    ] = "float32"

    @property
    def private_images(self) -> int:
        """Number of private images that one victim holds."""
        return self.images if self.images is not None else self.batch_size * self.local_steps

    @property
    def default_id(self) -> str:
        """Id of an unlabeled entry, for instance `gradient-b1` or `delta-s4-b8`."""
        if self.update == "gradient":
            return f"gradient-b{self.batch_size}"
        epochs = f"-e{self.epochs}" if self.epochs > 1 else ""
        shuffled = "-shuffled" if self.shuffle else ""
        return f"{self.update}-s{self.local_steps}{epochs}-b{self.batch_size}{shuffled}"


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
class Auxiliary:
    """Images that the adversary owns: (M, C, *spatial) in [0, 1] with targets, disjoint from all victims."""

    images: Tensor
    targets: Tensor


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


KNOWLEDGE: Mapping[str, str] = {
    "labels": "the victim's true labels (oracle)",
    "masks": "the victim's true segmentation masks (oracle)",
    "logits": "the model's outputs on the private images (oracle)",
    "batch_norm_statistics": "the exact batch statistics of the private batch (oracle)",
    "auxiliary": "images of other patients from the pool's auxiliary part, or of another data entry",
    "defense": "the mechanism of the client's defense",
}
"""What a threat model can grant beyond what every adversary knows, with its meaning."""

ORACLES = frozenset({"labels", "masks", "logits", "batch_norm_statistics"})
"""Knowledge that a real adversary would not have."""


CAPABILITIES: Mapping[str, str] = {
    "parameters": "chooses the tensors that it sends",
    "architecture": "chooses the architecture that it sends",
    "inconsistent_models": "sends different models to different clients",
    "recipe": "chooses learning rate and into how many local steps clients divide their images",
    "secure_aggregation": "chooses the aggregation's clipping and quantization",
}
"""What a threat model can let a malicious server change, with its meaning."""


@dataclass(frozen=True)
class Knowledge:
    """Granted knowledge. A field is None unless the threat model grants it and the attack declares that it reads it."""

    labels: Tensor | None = None
    masks: Tensor | None = None
    logits: Tensor | None = None
    batch_norm_statistics: Tensors | None = None
    auxiliary: Auxiliary | None = None
    defense: Mechanism | None = None


@dataclass(frozen=True)
class Observation:
    """All that the adversary sees and may know. An attack receives observations and nothing else.

    model: what it sent to the victim, or saw. update: what it received. recipe: how the client trained, None when
    withheld. clients: how many clients the update comes from. broadcast: all that a server sent which prepared it,
    with its secret; None where it sent one model as agreed. senders: the numbers of the clients that sent something,
    where others withheld theirs; None if all did.
    """

    model: GlobalModel
    update: Update
    recipe: Recipe | None
    threat_model: str
    knowledge: Knowledge = field(default_factory=Knowledge)
    clients: int = 1
    broadcast: Broadcast | None = None
    senders: tuple[int, ...] | None = None

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
