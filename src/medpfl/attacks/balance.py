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


def balanced(
    model: GlobalModel, behind: Callable[[GlobalModel], GlobalModel], images: Tensor, recipe: Recipe | None
) -> GlobalModel:
    """`model` with the biases of its last layer shifted so that its mean output is zero once a module is in front.

    Behind the module all images have nearly the same output. Where that is sure of a class, images of this class have
    errors that rounding and quantization swallow beside those of the others. behind: puts the module in front of a model.
    images: auxiliary (M, C, *spatial). The same model where it does not end in a dense layer with biases.
    """
    layer = last_dense(model)
    if isinstance(model.task, Segmentation) or isinstance(layer, str) or layer.bias is None:
        return model
    mode = "eval" if recipe is None else recipe.batch_norm
    with torch.no_grad():
        output, _ = behind(model).forward(images[:MOST_IMAGES], batch_norm=mode)
    shifted = model.parameters[layer.bias] - output.mean(dim=0)
    return replace(model, parameters={**model.parameters, layer.bias: shifted})
