"""How likely an observed update is, given a candidate's gradients and what is known of the client's defense.

One file per family of mechanisms; each registers a function `(mechanism, view) -> Likelihood` with `likelihood_of`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from medpfl.attacks.matching.objectives import Distance, Transform, Transformed, squared_distance
from medpfl.core.domain import GlobalModel, Recipe
from medpfl.core.mechanisms import Adapters, Mechanism, Shared, Unchanged


@dataclass(frozen=True)
class View:
    """What a likelihood is made for.

    names: the trainable tensors, in the order in which candidates' gradients and targets come. targets: (V, *shape) each
    for V victims, in the units of a gradient. model: what the first victim received. recipe: None where it is withheld.
    examples: private images of a victim. earlier: the targets of earlier rounds with the same model and images, the
    first round first. feedback: whether a round gives back what the ones before it left out.
    """

    names: tuple[str, ...]
    targets: tuple[Tensor, ...]
    model: GlobalModel
    recipe: Recipe | None
    examples: int = 1
    earlier: tuple[tuple[Tensor, ...], ...] = ()
    feedback: bool = False

    @property
    def unit(self) -> float:
        """What was sent is `unit` times a gradient (for weights: beside the old weights).

        1 for gradients, -learning rate * steps for what several local steps of it change.
        """
        if self.recipe is None or self.recipe.update == "gradient":
            return 1.0
        return -self.recipe.learning_rate * self.recipe.local_steps * self.recipe.epochs

    @property
    def scale(self) -> float:
        """The same without its sign: noise of scale b on what was sent is noise of scale b / scale on the gradient."""
        return abs(self.unit)


@dataclass(frozen=True)
class Likelihood:
    """The negative log likelihood of an observed update, up to a constant, as a distance from a candidate's gradients.

    distance: of the (transformed) gradients and the targets, as those of `objectives`; it gets `weights`. None for a
    mechanism that only transforms: then the squared distance. transform: the part of the mechanism without randomness,
    (gradients, targets) of all tensors -> gradients that would have been sent, differentiable in the gradients. weights:
    one per tensor of the view; 0 for tensors that say nothing, so that they are never computed. None for ones.
    survivors: the mechanism set some entries to zero after all noise, so an earlier part's distance counts the others.
    evidence: what the distance gets in place of the targets, (V, ...) for each tensor, where it needs more than these.
    nats: whether weights times distance is a negative log likelihood to scale, so that a prior's can be added.
    deviation: where it is not, by how much the gradients may be off, as a share of the update's root mean square; None for
    whatever the attack assumes. notes: what the attacker supposed, for the report.
    """

    distance: Distance | None = None
    transform: Transform | None = None
    weights: Tensor | None = None
    survivors: bool = False
    evidence: tuple[Tensor, ...] | None = None
    nats: bool = False
    deviation: float | None = None
    notes: tuple[str, ...] = ()

    def matching(self) -> Distance:
        """The distance between a candidate's own gradients and the targets, the transform included."""
        distance = self.distance or squared_distance
        return distance if self.transform is None else Transformed(distance, self.transform)

    def tensor_weights(self, names: Sequence[str]) -> Tensor:
        """Weights (tensors,) in float64."""
        if self.weights is None:
            return torch.ones(len(names), dtype=torch.float64)
        return self.weights.to("cpu", torch.float64)


def even(view: View, factor: float) -> Tensor:
    """The same weight for all tensors of a view."""
    return torch.full((len(view.names),), factor, dtype=torch.float64)


class NotCombined(Exception):
    """A mechanism, or a composition of several, has no likelihood; the message says why, as half a sentence."""


M = TypeVar("M", bound=Mechanism)
Maker = Callable[[Any, View], Likelihood]

_MAKERS: dict[type[Mechanism], Maker] = {}


def likelihood_of(kind: type[M]) -> Callable[[Callable[[M, View], Likelihood]], Callable[[M, View], Likelihood]]:
    """Registers the likelihood of a kind of mechanism; a subclass without its own gets that of its base."""

    def register(make: Callable[[M, View], Likelihood]) -> Callable[[M, View], Likelihood]:
        if kind in _MAKERS:
            raise ValueError(f"the likelihood of {kind.__name__} is registered twice")
        _MAKERS[kind] = make
        return make

    return register


def defended(mechanism: Mechanism | None) -> bool:
    """Whether a defense is known that changes what is sent of the tensors that are sent."""
    return mechanism is not None and not isinstance(mechanism, Unchanged | Shared | Adapters)


def has_likelihood(mechanism: Mechanism) -> bool:
    """Whether a likelihood was registered for this kind of mechanism."""
    return _maker(mechanism) is not None


def likelihood(mechanism: Mechanism | None, view: View) -> Likelihood:
    """The likelihood under a known mechanism; the squared distance where it is not known or has none.

    Raises NotCombined where the mechanism's parts cannot be combined.
    """
    if mechanism is None:
        return likelihood(Unchanged(), view)
    maker = _maker(mechanism)
    if maker is None:
        name = type(mechanism).__name__
        notes = (f"no likelihood is known for {name}: squared differences were taken",)
        return replace(likelihood(Unchanged(), view), notes=notes)
    return maker(mechanism, view)


def why_no_likelihood(
    mechanism: Mechanism | None, model: GlobalModel, recipe: Recipe | None, examples: int
) -> str | None:
    """The reason why a known mechanism's parts cannot be combined; None if there is a likelihood."""
    targets = tuple(tensor[None] for tensor in model.parameters.values())
    try:
        likelihood(mechanism, View(tuple(model.parameters), targets, model, recipe, examples))
    except NotCombined as error:
        return str(error)
    return None


def _maker(mechanism: Mechanism) -> Maker | None:
    return next((_MAKERS[kind] for kind in type(mechanism).__mro__ if kind in _MAKERS), None)


def chained(transforms: Sequence[Transform]) -> Transform | None:
    """Several transforms one after the other; None where there is none."""
    if not transforms:
        return None

    def transform(gradients: Sequence[Tensor], targets: Sequence[Tensor]) -> list[Tensor]:
        found = list(gradients)
        for one in transforms:
            found = list(one(found, targets))
        return found

    return transform
