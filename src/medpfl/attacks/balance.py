"""Evens out how sure a crafted model is, so that the images' errors are of one size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from medpfl.attacks.layers import last_dense
from medpfl.core.domain import GlobalModel, Recipe
from medpfl.core.tasks import Segmentation

MOST_IMAGES = 256
"""Auxiliary images that the mean output is taken over."""

RAREST = 0.01
"""No class is taken to be rarer."""


def balanced(
    model: GlobalModel,
    behind: Callable[[GlobalModel], GlobalModel],
    images: Tensor,
    recipe: Recipe | None,
    targets: Tensor | None = None,
) -> GlobalModel:
    """`model` with the biases of its last layer shifted so that its mean output is zero once a module is in front.

    Behind the module all images have nearly the same output. Where that is sure of a class, images of this class have
    errors that rounding and quantization swallow beside those of the others. behind: puts the module in front of a model.
    images: auxiliary (M, C, *spatial). targets: their labels; the output is then that of the classes' shares, so that
    the errors of a batch cancel and a unit's gradient is not much larger than what one image adds to it. The same model
    where it does not end in a dense layer with biases.
    """
    layer = last_dense(model)
    if isinstance(model.task, Segmentation) or isinstance(layer, str) or layer.bias is None:
        return model
    mode = "eval" if recipe is None else recipe.batch_norm
    with torch.no_grad():
        output, _ = behind(model).forward(images[:MOST_IMAGES], batch_norm=mode)
    shifted = model.parameters[layer.bias] - output.mean(dim=0) + _outputs_of_shares(model, targets).to(output)
    return replace(model, parameters={**model.parameters, layer.bias: shifted})


def _outputs_of_shares(model: GlobalModel, targets: Tensor | None) -> Tensor:
    """The outputs (classes,) whose probabilities are the classes' shares of the targets; zero without targets."""
    if targets is None:
        return torch.zeros(model.task.classes)
    if targets.ndim == 2:
        return targets.double().mean(dim=0).clamp(RAREST, 1 - RAREST).logit()
    counts = torch.bincount(targets, minlength=model.task.classes).double()
    return (counts / counts.sum()).clamp_min(RAREST).log()
