"""Reads an update as the gradient that a client computed: what every attack here starts from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from medpfl.attacks.first_step import adam_gradient, idle_change
from medpfl.core.devices import CPU, moved
from medpfl.core.domain import Failure, Observation, Recipe, Reconstruction, UpdateKind
from medpfl.core.functional import differs, is_finite
from medpfl.core.session import Session

CLIP_MARGIN = 1e-4
"""An update whose norm comes this close (relatively) to the clipping bound counts as clipped."""


@dataclass(frozen=True)
class GradientView:
    """An update turned into a gradient of the mean loss at the received model, in float64.

    tensors: one entry per trainable tensor. lost: of tensors in which the client's optimizer hides the size of some
    entries, which (bool). notes: why it is not that gradient up to rounding, but a mean over local
    steps, or known up to a positive factor only; empty if it is.
    """

    tensors: dict[str, Tensor]
    notes: tuple[str, ...] = ()
    lost: Mapping[str, Tensor] = field(default_factory=dict)

    def known_units(self, weight: str, bias: str) -> Tensor:
        """Which units of a dense layer have no lost entry, bool (units,)."""
        whole = torch.ones(len(self.tensors[bias]), dtype=torch.bool, device=self.tensors[bias].device)
        for name in (weight, bias):
            if name in self.lost:
                whole &= ~self.lost[name].flatten(1).any(dim=1) if name == weight else ~self.lost[name]
        return whole

    def why_lost(self, *names: str) -> str | None:
        """Why no exact ratios can be read of these tensors, half a sentence; None if all entries are known."""
        hidden = [name for name in names if name in self.lost]
        if not hidden:
            return None
        return f"the client's optimizer moved '{hidden[0]}' as far as it ever does, which hides the gradient's size"

    @property
    def exact(self) -> bool:
        """Whether it is that gradient up to rounding."""
        return not self.notes


def settled_at_once(observation: Observation) -> Reconstruction | Failure | None:
    """What comes of an update that no attack needs to look into; None if it is worth an attack.

    Trainable tensors that are not finite break every attack down: a `Failure`. An update that changes nothing is
    finite and shows nothing: no images come back.
    """
    update = observation.update
    if not all(is_finite(tensor) for tensor in update.trainable.values()):
        return Failure("the update contains values that are not finite")
    if update.kind == "weights":
        smallest = sorted(update.trainable.items(), key=lambda item: item[1].numel())
        changed = any(differs(tensor, observation.sent_parameter(name)) for name, tensor in smallest)
    else:
        changed = any(bool(tensor.any()) for tensor in update.trainable.values())
    if not changed:
        return nothing_came_back(observation, "the update is zero, the private images change nothing in the model")
    return None


def read_each(
    observations: Sequence[Observation],
    session: Session,
    read: Callable[[int, Observation], Reconstruction | Failure],
) -> list[Reconstruction | Failure]:
    """Reads every observation on its own, as closed forms do, on the CPU: their small dense systems are fastest there.

    `read` takes the place of an observation and one worth an attack.
    """
    results: list[Reconstruction | Failure] = []
    for place, observation in enumerate(moved(list(observations), CPU)):
        settled = settled_at_once(observation)
        results.append(read(place, observation) if settled is None else settled)
        session.checkpoint(place + 1, len(observations), dict)
    return results


def averaged(observation: Observation) -> Observation:
    """The observation with the mean of all rounds' trainable tensors in place of those of the last round."""
    if not observation.earlier:
        return observation
    updates = [*observation.earlier, observation.update]
    means = {
        name: torch.stack([one.trainable[name].double() for one in updates]).mean(dim=0).to(tensor)
        for name, tensor in observation.update.trainable.items()
    }
    return replace(observation, update=replace(observation.update, trainable=means), earlier=())


def nothing_came_back(observation: Observation, why: str) -> Reconstruction:
    """A reconstruction without images: the attack did its work and the update showed it nothing.

    The private images are then scored against the adversary's fallback, as all for which no image comes back. `why`
    is half a sentence for the report.
    """
    return Reconstruction(
        images=torch.zeros((0, *observation.model.image_shape)),
        labels=None,
        objective=float("nan"),
        trace=(),
        gradient_evaluations=0,
        stop_reason=f"nothing came back: {why}",
    )


def change(observation: Observation, names: Sequence[str] | None = None) -> dict[str, Tensor]:
    """New minus old trainable tensors of a `delta` or `weights` update, in float64: all, or those in `names`."""
    trainable = _chosen(observation, names)
    if observation.update.kind == "delta":
        return trainable
    return {name: tensor - observation.sent_parameter(name).double() for name, tensor in trainable.items()}


def gradient_view(
    observation: Observation, names: Sequence[str] | None = None, *, alone: bool = False, first_only: bool = False
) -> GradientView:
    """The gradient that the update shows, exactly where one optimizer step (or a plain gradient) was sent.

    One SGD step without clipping moves the model by -learning_rate * (gradient + weight_decay * parameters), so the
    gradient follows exactly. Adam's first step is undone entry by entry (`first_step`); in large entries it shows little
    but signs. Several steps give their mean, weighted as momentum weights them. A withheld recipe leaves a positive
    factor open.

    names: the tensors of interest, all if None; clipping that changed all alike is noted only with all. alone: of all
    clients behind an aggregate, only the first had gradients in the tensors of interest; the view is then
    of its gradient. first_only: of all local steps, only the first had. Both matter to who made the model so.
    """
    kind, recipe = observation.update.kind, observation.recipe
    factors = linear_factors(observation, first_only)
    if factors is None:
        assert recipe is not None  # who does not know it takes what was sent as the gradient's direction
        steps = recipe.local_steps * recipe.epochs
        return _adam_undone(observation, change(observation, names), recipe, alone, steps)
    of_update, of_sent = factors
    tensors = {name: of_update * tensor for name, tensor in _chosen(observation, names).items()}
    if of_sent:
        tensors = {
            name: tensor + of_sent * observation.sent_parameter(name).double() for name, tensor in tensors.items()
        }
    if recipe is None:
        withheld = ("the recipe is withheld, so the gradient's scale is unknown",)
        return GradientView(tensors, () if kind == "gradient" else withheld)
    if kind != "gradient" and recipe.optimizer != "sgd":
        return GradientView(tensors, (f"{recipe.optimizer} shows little more than the gradient's signs",))
    if kind != "gradient" and (steps := recipe.local_steps * recipe.epochs) > 1:
        return GradientView(tensors, (f"the update mixes {steps} local steps",))
    if recipe.gradient_clip is not None and _norm(tensors) >= _almost(recipe.gradient_clip):
        return GradientView(tensors, ("the client's clipping scaled the gradient by an unknown factor",))
    return GradientView(tensors)


def linear_factors(observation: Observation, first_only: bool = False) -> tuple[float, float] | None:
    """What update and sent tensors are multiplied by in `gradient_view`; None where it is no such sum, as after Adam."""
    kind, recipe = observation.update.kind, observation.recipe
    if kind == "gradient":
        return 1.0, 0.0
    if recipe is None:
        return -1.0, float(kind == "weights")
    if recipe.optimizer != "sgd" and (recipe.local_steps * recipe.epochs == 1 or first_only):
        return None
    counted = recipe.learning_rate * sum(step_weights(recipe))
    decay = recipe.weight_decay if recipe.optimizer != "adam" else 0.0
    return -1 / counted, (1 / counted if kind == "weights" else 0.0) - decay


def _adam_undone(
    observation: Observation, moved: dict[str, Tensor], recipe: Recipe, alone: bool, steps: int
) -> GradientView:
    """The gradient behind the first of so many steps of Adam, all others having had none."""
    sent = observation.model.parameters if alone else {name: observation.sent_parameter(name) for name in moved}
    tensors: dict[str, Tensor] = {}
    masks: dict[str, Tensor] = {}
    entries = 0
    for name, tensor in moved.items():
        own = _own_change(observation, name, tensor, recipe) if alone else tensor
        tensors[name], hidden = adam_gradient(own, sent[name], recipe, steps)
        entries += hidden.numel()
        if bool(hidden.any()):
            masks[name] = hidden
    lost = sum(int(mask.sum()) for mask in masks.values())
    notes: tuple[str, ...] = ()
    if lost:
        notes = (f"{recipe.optimizer} hides the gradient's size in {lost / entries:.1%} of its entries",)
    if observation.clients > 1 and not alone:
        notes = (*notes, f"{recipe.optimizer} scaled every client's gradient on its own, so their mean is not exact")
    return GradientView(tensors, notes, masks)


def _own_change(observation: Observation, name: str, mean: Tensor, recipe: Recipe) -> Tensor:
    """The first client's change of a tensor that the others change by weight decay only, out of the mean over all."""
    total = mean * observation.clients
    if not recipe.weight_decay or observation.broadcast is None:
        return total
    for client in range(1, observation.clients):
        total = total - idle_change(observation.broadcast.model(client).parameters[name], recipe)
    return total


def step_weights(recipe: Recipe) -> list[float]:
    """How often each local step's gradient counts in the whole change, in units of the learning rate.

    Momentum m repeats the gradient of step s in all later ones: 1 + m + ... + m^(steps - s) times.

    >>> step_weights(Recipe(update="delta", local_steps=3, momentum=0.5))
    [1.75, 1.5, 1.0]
    """
    steps = recipe.local_steps * recipe.epochs
    momentum = recipe.momentum if recipe.optimizer == "sgd" else 0.0
    return [sum(momentum**later for later in range(steps - step)) for step in range(steps)]


def one_gradient(recipe: Recipe | None) -> bool:
    """Whether an update shows the gradient of one step; a withheld recipe is taken to."""
    return recipe is None or recipe.update == "gradient" or recipe.local_steps * recipe.epochs == 1


def why_no_readout(recipe: Recipe | None) -> str | None:
    """The reason why ratios of gradient entries say nothing exact under this recipe; None if they do."""
    if recipe is None or recipe.update == "gradient" or recipe.optimizer == "sgd":
        return None
    return f"{recipe.optimizer} scales every entry on its own, which destroys the ratios that are read out; needs SGD"


def why_no_ratios(recipe: Recipe | None) -> str | None:
    """The same for read-outs that look at what a single step of Adam hides (`GradientView.why_lost`)."""
    reason = why_no_readout(recipe)
    return None if reason is None or one_gradient(recipe) else f"{reason} or a single step"


def why_no_scale(recipe: Recipe | None, update: UpdateKind) -> str | None:
    """The reason why an update shows a gradient's direction only; None if it shows its length too."""
    if recipe is not None or update == "gradient":
        return None
    return f"the recipe of this {update} update is withheld, so the gradient's scale is unknown: match its direction"


def batch_norm_mode(recipe: Recipe | None) -> Literal["train", "eval"]:
    """How the attacker runs batch norm: as the recipe says, `eval` when it is withheld."""
    return recipe.batch_norm if recipe is not None else "eval"


def _chosen(observation: Observation, names: Sequence[str] | None) -> dict[str, Tensor]:
    sent = observation.update.trainable
    return {name: sent[name].double() for name in (sent if names is None else names)}


def _norm(tensors: dict[str, Tensor]) -> float:
    return float(torch.stack([tensor.square().sum() for tensor in tensors.values()]).sum().sqrt())


def _almost(bound: float) -> float:
    return bound * (1.0 - CLIP_MARGIN)
