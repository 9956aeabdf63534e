"""What a leakage module must be like where clients take several local steps before they send anything.

Every step moves the module, so that later images meet other units than the server meant. Two ways out: a module that is
off after the first step and keeps what it saw (`first_batch`), and one that hardly moves (`all_batches`).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from medpfl.attacks.calibration import Search
from medpfl.attacks.layers import last_dense
from medpfl.attacks.query_bins import QueryBins
from medpfl.attacks.sizes import Sizes, around
from medpfl.core.domain import Auxiliary, GlobalModel, Recipe
from medpfl.core.tasks import Segmentation

Steps = Literal["auto", "first_batch", "all_batches", "plain"]

RAISED = 2.0
"""By how much the rarest class's output is raised, so that nearly all images have errors of one sign."""

QUIET = 1e-2
"""What a quiet body's weights are multiplied by in all, so that it answers less to what the module shows it."""

QUIET_SCALES = (1e-1, 1.0)
QUIET_GAINS = (10.0, 1.0, 100.0, 1000.0)
"""Sizes at which a module in front of a quiet body moves by less than a bin and by more than rounding."""


def candidates(recipe: Recipe | None, chosen: Steps) -> tuple[Steps, ...]:
    """Which of both ways are tried. The second needs steps that are linear in the gradient.

    Adam's steps are as large for the quietest body, and half precision has no room for small changes.
    """
    if chosen != "auto":
        return (chosen,)
    linear = recipe is not None and recipe.optimizer == "sgd" and recipe.precision in ("float32", "float64")
    return ("first_batch", "all_batches") if linear else ("first_batch",)


def self_stopping(model: GlobalModel, auxiliary: Auxiliary, offset: Tensor) -> tuple[GlobalModel, Tensor]:
    """The model and the direction (D,) of length 1 of a module that turns itself off in the first step.

    The direction raises the output of the class that is rarest in the auxiliary labels, and that class's bias is
    raised besides, so that the error of all other images lowers the units that they activate: a module whose first
    layer is small then is off for all that follows. The price is paid by images of that class, whose gradients are
    weaker. offset: (D,), what the module shows the body of no image at all. Without a dense last layer with biases
    no bias is raised; where targets are masks, the first class counts as rarest.
    """
    rarest = _rarest(auxiliary.targets, model)
    shown = offset.to(auxiliary.images.dtype).reshape(1, *model.image_shape).requires_grad_()
    with torch.enable_grad():
        output, _ = model.forward(shown, batch_norm="eval")
        outputs = output.flatten(2).mean(dim=2)[0] if output.ndim > 2 else output[0]
        others = (outputs.sum() - outputs[rarest]) / max(1, len(outputs) - 1)
        (gradient,) = torch.autograd.grad(outputs[rarest] - others if len(outputs) > 1 else outputs[0], shown)
    direction = gradient.double().flatten()
    layer = _output_layer(model)
    if layer is not None:
        raised = model.parameters[layer].clone()
        raised[rarest] += RAISED
        model = replace(model, parameters={**model.parameters, layer: raised})
    return model, direction / direction.norm().clamp_min(torch.finfo(torch.float64).tiny)


def quiet(model: GlobalModel) -> GlobalModel:
    """The model with weights so small that the module in front of it hardly changes from step to step.

    What one step changes in the module's first layer per image, over its weights, and the same of the second layer have
    a product that no size of the module changes: it is the square of what the body answers to the module's output. All
    layers share the factor, since a single one that is much smaller than it was is soon what training makes of it.
    """
    weights = [name for name, tensor in model.parameters.items() if tensor.ndim > 1]
    smaller = {name: QUIET ** (1 / len(weights)) * model.parameters[name] for name in weights}
    return replace(model, parameters={**model.parameters, **smaller})


def quiet_sizes(scale: float | None, gain: float | None) -> Search[Sizes]:
    """What to try in front of a quiet body."""
    scales = QUIET_SCALES if scale is None else (scale,)
    gains = QUIET_GAINS if gain is None else (gain,)

    return Search([Sizes(one, other) for one in scales for other in gains], around(scale is None, gain is None))


def biases_from_weights(weight: Tensor, bias: Tensor, bins: QueryBins) -> Tensor:
    """The biases' gradients (K,) as far as the weights' (K, D) allow them, in float64.

    What a bin adds to a unit is its images times their errors, so that its query of the weights' gradient over its
    bias's gradient lies in the bin. Biases are larger than weights by far and round off what small steps add to them:
    those outside are moved to the nearest edge. The last bin of a query is open above and keeps its own.
    """
    weights, steps = bins.per_bin(weight.double()), bins.per_bin(bias.double())
    below, above = bins.bounds(bins.places.to(weight.device))
    values = (weights * bins.to(weights.device).rows_of(bins.places)).sum(dim=1)
    sides = torch.stack([values / below, values / above])
    possible = (below > 0) & above.isfinite()
    moved = torch.where(possible, steps.clamp(sides.amin(dim=0), sides.amax(dim=0)), steps)
    return torch.cat([part.flip(0).cumsum(0).flip(0) for part in moved.chunk(len(bins.edges))])


def _rarest(targets: Tensor, model: GlobalModel) -> int:
    """The class that is rarest in the labels; 0 where there are no labels by image."""
    if isinstance(model.task, Segmentation):
        return 0
    shares = (
        targets.double().mean(dim=0) if targets.ndim == 2 else torch.bincount(targets, minlength=model.task.classes)
    )
    return int(shares.argmin())


def _output_layer(model: GlobalModel) -> str | None:
    """The name of the biases that are added to the outputs, None where there are none."""
    layer = last_dense(model)
    return None if isinstance(model.task, Segmentation) or isinstance(layer, str) else layer.bias
