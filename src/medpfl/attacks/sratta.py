"""SRATTA: an honest server attributes images that it reads out of an aggregate to the clients that hold them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from medpfl.attacks.base import ATTACKS, Attack
from medpfl.attacks.certificates import Group, group, single_bias_gradients
from medpfl.attacks.co_activation import active_images, numbered, of_one_client
from medpfl.attacks.latent_bins import HiddenLayer, hidden_layer
from medpfl.attacks.layers import DenseLayer, first_dense, last_dense, pixel_map
from medpfl.attacks.updates import gradient_view, nothing_came_back, read_each, why_no_scale
from medpfl.core.config import STRICT
from medpfl.core.domain import Failure, GlobalModel, Observation, Recipe, Reconstruction, UpdateKind
from medpfl.core.session import NO_SESSION, Session

FLOOR = 1e-6
"""Bias gradients below this share of the largest one are taken for rounding."""

AT_ONCE = 128
"""Candidates whose Jacobians are held at once."""


@ATTACKS.register(
    "sratta",
    summary="honest server: reads images that alone activate a unit of a dense first layer, and groups them by client "
    "from what local training made them activate newly",
    paper="Marchand et al.: SRATTA: Sample Re-ATTribution Attack of Secure Aggregation in Federated Learning, ICML 2023 "
    "(one round; the certificate in place of a data oracle is ours)",
    limits="a dense first layer with bias on the pixels, ReLU, another dense layer; SGD without weight decay, at least "
    "two local steps; one round, where the paper uses twenty and twenty trainings; groups bear no client's name",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class Sratta(Attack):
    """1. Of a dense layer the aggregate gives dW_j and db_j summed over clients, local steps and images, so that
    x = dW_j / db_j where one image alone activated unit j. A candidate is kept if it lies in [0, 1], if several units
    show it, and if its part of the bias gradient is about what the model that was sent predicts for one image of one
    class: a mixture of two has twice that. 2. For every unit, the fewest kept images whose combination is (dW_j, db_j), each with about its
    expected part, are those that activated it. 3. Of
    these, some did so with the weights that were sent, the others only after local steps, which move a unit for one
    client alone: if the first are all of one client, the others are of the same.

    `clients` of the reconstruction are groups, numbered by size: images of one group are of one client, which client is
    not known, and two groups may be of the same.
    """

    drift: Annotated[
        float,
        Field(gt=0, lt=1, description="how far, relatively, local steps may take an image's part from the prediction"),
    ] = 0.6
    agreeing: Annotated[
        int, Field(ge=1, description="units that must show the same image; a mixture of images seldom repeats itself")
    ] = 2
    residual: Annotated[
        float, Field(gt=0, lt=1, description="relative error up to which images explain a unit's gradient")
    ] = 1e-4
    agreement: Annotated[
        float, Field(gt=0, description="root mean square pixel difference within which two units show the same image")
    ] = 1e-3

    presets: ClassVar[dict[str, dict[str, Any]]] = {"published": {"residual": 1e-5}, "quick": {}}

    def why_not(self, model: GlobalModel, recipe: Recipe | None, update: UpdateKind, examples: int) -> str | None:
        """Dense, ReLU, dense on the pixels; several SGD steps without weight decay; one class per image."""
        layer = first_dense(model)
        if isinstance(layer, str):
            return layer
        if isinstance(hidden := hidden_layer(model), str):
            return hidden
        if (last := last_dense(model)) != hidden.second:
            return (
                last if isinstance(last, str) else f"more layers than one lie between '{layer.module}' and the output"
            )
        if model.task.name != "single_label":
            return "the certificate needs one class per image"
        affine = pixel_map(model, layer)
        return affine if isinstance(affine, str) else _why_no_steps(recipe, update)

    def reconstruct(
        self,
        observations: Sequence[Observation],
        generators: Sequence[torch.Generator],
        session: Session = NO_SESSION,
    ) -> list[Reconstruction | Failure]:
        """Reads every observation on its own; draws nothing."""
        return read_each(observations, session, lambda _, observation: self._attack(observation))

    def _attack(self, observation: Observation) -> Reconstruction | Failure:
        model = observation.model
        known = (model, observation.recipe, observation.update.kind, observation.examples)
        if (reason := self.why_not(*known)) is not None:
            return Failure(reason)
        layer = first_dense(model)
        assert isinstance(layer, DenseLayer)
        assert layer.bias is not None
        affine = pixel_map(model, layer)
        assert not isinstance(affine, str)
        view = gradient_view(observation, (layer.weight, layer.bias))
        weight, bias = view.tensors[layer.weight], view.tensors[layer.bias]
        floor = FLOOR * float(bias.abs().max())
        if floor == 0.0:
            return nothing_came_back(observation, f"no unit of '{layer.module}' was active, its bias gradient is zero")
        units = (bias.abs() > floor).nonzero().flatten()
        shown = group(weight[units], bias[units], *affine, self.agreement)
        groups = [one for one in shown if len(one.members) >= self.agreeing]
        if not groups:
            return nothing_came_back(observation, f"no image is shown alone by {self.agreeing} units")
        errors, labels = self._certified(model, layer, groups, units, bias, observation.examples)
        order = errors.argsort(stable=True)
        order = order[errors[order] <= self.drift][: observation.examples]
        if not len(order):
            return nothing_came_back(observation, f"none of {len(groups)} candidates is a single image")
        images = torch.stack([groups[place].pixels for place in order.tolist()])
        inputs = affine[0] + affine[1] * images
        before = inputs @ model.parameters[layer.weight].double().T + model.parameters[layer.bias].double()
        expected = self._expected(model, images, labels[order]) / observation.examples
        active = active_images(weight, bias, inputs, before, expected, self.residual, self.drift)
        attributed = of_one_client(active, len(images))
        newly = sum(bool(one.newly) for one in active)
        error = float(errors[order].mean())
        images = images.reshape(-1, *model.image_shape)
        return Reconstruction(
            images=images.clamp(0.0, 1.0),
            labels=labels[order],
            objective=error,
            trace=((0, error),),
            gradient_evaluations=0,
            stop_reason="read out and grouped in closed form",
            unclamped=images,
            notes=(
                *view.notes,
                f"{len(images)} of {len(groups)} candidates are single images by their part of the bias gradient",
                f"{len(active)} of {len(units)} units are explained by them, in {newly} of these some became active "
                "during the round",
                f"groups of images of one client, whichever it is: {', '.join(str(len(one)) for one in attributed) or 'none'}",
            ),
            clients=numbered(attributed, len(images)),
        )

    def _certified(
        self,
        model: GlobalModel,
        layer: DenseLayer,
        groups: Sequence[Group],
        units: Tensor,
        bias: Tensor,
        examples: int,
    ) -> tuple[Tensor, Tensor]:
        """How far each candidate's part of the bias gradient is from that of one image, and of which class, relatively."""
        double, errors, labels = model.to(torch.float64), [], []
        for start in range(0, len(groups), AT_ONCE):
            chunk = groups[start : start + AT_ONCE]
            predicted = single_bias_gradients(double, layer, torch.stack([one.pixels for one in chunk])) / examples
            for one, parts in zip(chunk, predicted, strict=True):
                members = units[one.members]
                missed = (bias[members] - parts[:, members]).norm(dim=1) / parts[:, members].norm(dim=1)
                best = missed.nan_to_num(nan=torch.inf).min(dim=0)
                errors.append(best.values)
                labels.append(best.indices)
        return torch.stack(errors), torch.stack(labels)

    def _expected(self, model: GlobalModel, images: Tensor, labels: Tensor) -> Tensor:
        """What an image of its class (K,) adds to each unit's bias gradient where it activates the unit: (K, m)."""
        hidden = hidden_layer(model)
        assert isinstance(hidden, HiddenLayer)  # `why_not` sees to that
        double = model.to(torch.float64)
        with torch.no_grad():
            outputs, _ = double.forward(images.reshape(-1, *model.image_shape))
        wrong = torch.softmax(outputs, dim=1) - model.task.encode(labels).double()
        expected: Tensor = wrong @ double.parameters[hidden.second.weight]
        return expected


def _why_no_steps(recipe: Recipe | None, update: UpdateKind) -> str | None:
    """The reason why local training leaves no trace by which images could be attributed; None if it does."""
    if (reason := why_no_scale(recipe, update)) is not None:
        return reason
    if recipe is None or recipe.update == "gradient" or recipe.local_steps * recipe.epochs == 1:
        return "one local step makes no image activate a unit newly, so nothing can be attributed: needs several steps"
    if recipe.optimizer != "sgd":
        return (
            f"{recipe.optimizer} scales every entry on its own, which destroys the ratios that are read out; needs SGD"
        )
    if recipe.weight_decay:
        return "weight decay moves units for all clients, so becoming active says nothing of a client"
    return None
