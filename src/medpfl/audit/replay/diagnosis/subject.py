"""What a diagnosis looks at: one recorded update with all that the server knows of it, and what was found out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from medpfl.attacks.updates import step_weights
from medpfl.core.domain import GlobalModel, Observation, Recipe, Tensors
from medpfl.federation.changes import norm, sent_change

Standing = Literal["hinders", "helps", "neutral"]
"""Whether a fact stands in an attack's way, opens the way, or neither."""


@dataclass(frozen=True)
class Fact:
    """One thing that was measured of an update: a sentence, and the number that supports it where one does.

    name: which measurement, the same word for all updates; of reasons `why:` and what the attack takes. attack: the attack that it is about, empty if about the
    update itself.
    """

    name: str
    text: str
    value: float | None = None
    standing: Standing = "neutral"
    attack: str = ""


@dataclass(frozen=True)
class Subject:
    """One update.

    raw: its trainable tensors in the types in which they came. norms: by client, how much each client of the round
    changed the model (L2). fresh: the same architecture, newly drawn. said: what the client's message said beside the
    tensors. stated: whether the client itself said how many images there were.
    """

    observation: Observation
    raw: Tensors
    norms: Mapping[str, float]
    fresh: GlobalModel
    said: Mapping[str, object]
    stated: bool = True

    @property
    def model(self) -> GlobalModel:
        """What the client received."""
        return self.observation.model

    @property
    def recipe(self) -> Recipe | None:
        """How clients are said to train, None if nobody said."""
        return self.observation.recipe

    @cached_property
    def change(self) -> dict[str, Tensor]:
        """New minus old trainable tensors, or the gradient where one was sent, in float64."""
        return sent_change(self.observation.update, self.model.parameters)

    @cached_property
    def size(self) -> float:
        """L2 norm of the change."""
        return norm(self.change)

    @property
    def entries(self) -> int:
        """Number of trainable entries that were sent."""
        return sum(tensor.numel() for tensor in self.change.values())

    @property
    def gradient_size(self) -> float | None:
        """L2 norm of the (mean) gradient behind the change; None where no recipe of SGD says the scale."""
        recipe = self.recipe
        if self.observation.update.kind == "gradient":
            return self.size
        if recipe is None or recipe.optimizer != "sgd":
            return None
        return self.size / (recipe.learning_rate * sum(step_weights(recipe)))

    def rounding(self, name: str) -> float:
        """Typical rounding error (standard deviation) of one entry of a tensor's change, from the type that came."""
        tensor = self.raw[name]
        if not tensor.is_floating_point():
            return 0.0
        values = [tensor.double().square().mean().sqrt()]
        if self.observation.update.kind == "weights":
            values.append(self.model.parameters[name].double().square().mean().sqrt())
        return torch.finfo(tensor.dtype).eps * max(map(float, values))


def plural(number: int, noun: str) -> str:
    """A count with its noun.

    >>> plural(1, "image"), plural(1200, "image"), plural(2, "entry"), plural(3, "batch")
    ('1 image', '1,200 images', '2 entries', '3 batches')
    """
    many = f"{noun[:-1]}ies" if noun.endswith("y") else f"{noun}{'es' if noun.endswith(('s', 'h')) else 's'}"
    return f"{number:,} {noun if number == 1 else many}"


def share(value: float) -> str:
    """A share in percent, with as many digits as its size needs.

    >>> share(0.5), share(0.00123), share(1.2e-7), share(0.0)
    ('50%', '0.12%', '1.2e-05%', '0%')
    """
    percent = 100 * value
    if percent == 0 or percent >= 1:
        return f"{percent:.0f}%" if percent < 99 or percent == 100 else f"{percent:.2f}%"
    return f"{percent:.2f}%" if percent >= 0.01 else f"{percent:.1e}%"
