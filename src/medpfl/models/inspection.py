"""What validators look at, and what they find."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from medpfl.core.domain import GlobalModel, Recipe
from medpfl.core.registry import Registry
from medpfl.models.probe import Layer, Probe

Severity = Literal["info", "warning", "refusal"]


@dataclass(frozen=True)
class Finding:
    """What an audit of a model will or will not mean, with the reason. A refusal means that it cannot be audited."""

    code: str
    severity: Severity
    message: str


@dataclass(frozen=True)
class Inspection:
    """A model, how it is trained (None if not yet known), and one forward pass of it."""

    model: GlobalModel
    recipe: Recipe | None
    probe: Probe

    @property
    def pixels(self) -> int:
        """Numbers in one image."""
        return math.prod(self.model.image_shape)

    @property
    def last_layer(self) -> Layer | None:
        """The dense layer whose outputs are the class scores, if the model ends in one."""
        last = self.probe.layers[-1] if self.probe.layers else None
        dense = last is not None and isinstance(last.module, nn.Linear)
        return last if dense and last is not None and last.module.out_features == self.model.task.classes else None

    @property
    def first_trainable_layer(self) -> Layer | None:
        """The first layer that is used and has trainable tensors."""
        for layer in self.probe.layers:
            own = (
                f"{layer.path}.{name}" if layer.path else name
                for name, _ in layer.module.named_parameters(recurse=False)
            )
            if any(name in self.model.parameters for name in own):
                return layer
        return None

    def uses(self, functions: frozenset[str]) -> list[str]:
        """Which of these PyTorch functions the forward pass calls, sorted."""
        return sorted(functions & self.probe.functions)


Validator = Callable[[Inspection], Iterator[Finding]]

VALIDATORS: Registry[Validator] = Registry("validator")
