"""Reads the labels of images that came back from bins: the error that each put into its bin depends on its class."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from medpfl.attacks.bin_readout import Candidates
from medpfl.attacks.front import SECOND_BIAS, SECOND_WEIGHT, WEIGHT, behind
from medpfl.attacks.query_bins import QueryBins
from medpfl.core.domain import GlobalModel
from medpfl.core.tasks import SingleLabel


def read_labels(
    model: GlobalModel,
    candidates: Candidates,
    bias: Tensor,
    bins: QueryBins,
    examples: int,
    batch_norm: Literal["train", "eval"] = "eval",
) -> Tensor | None:
    """The labels (M,) of what was read, or None where targets are no classes.

    model: as it was sent, with its front. bias: gradient (K,) of the first layer's biases, in which every image has an
    error of its own, the same in all units that it activates. examples: how many images the gradient is the mean of.

    Each image's error is what explains the biases' gradient best, all images together, bin by bin; its label is the
    class whose error, computed on the image, lies next to that. Images that did not come back disturb their own bins only.
    """
    if not isinstance(model.task, SingleLabel) or not len(candidates.images):
        return None
    size = bins.edges.shape[1]
    values = bins.values(candidates.images)
    places = bins.bins(values)
    places[torch.arange(len(places)), candidates.bins // size] = candidates.bins % size
    pattern = bins.per_bin(bins.active(places).T)
    found = torch.linalg.lstsq(pattern, bins.per_bin(bias)[:, None], driver="gelsd").solution
    labels: Tensor = (found - errors(model, values, bins, examples, batch_norm)).abs().argmin(dim=1)
    return labels


def errors(
    model: GlobalModel, values: Tensor, bins: QueryBins, examples: int, batch_norm: Literal["train", "eval"]
) -> Tensor:
    """What the bias of an active unit gets as gradient from each image, for each class: (M, classes), float64.

    values: (M, Q), what the queries measure of the images, which is all that the module passes on of them. Costs one
    forward pass of the model behind the module, and a backward pass for each class.
    """
    column, count = model.parameters[SECOND_WEIGHT][:, 0].contiguous(), len(values)
    first = model.parameters[WEIGHT][0].double() @ bins.rows[0] / bins.rows[0].square().sum()
    hidden = first * (values[:, :, None] - bins.edges).clamp_min(0).sum(dim=(1, 2))
    inputs = model.parameters[SECOND_BIAS] + hidden.float()[:, None] * column
    inputs = inputs.reshape(count, *model.image_shape).requires_grad_()
    output, _ = behind(model).forward(inputs, batch_norm=batch_norm)
    found = []
    for label in range(model.task.classes):
        loss = model.task.loss(output, torch.full((count,), label, device=inputs.device)) * count / examples
        (gradient,) = torch.autograd.grad(loss, inputs, retain_graph=True)
        found.append(gradient.flatten(1) @ column)
    return torch.stack(found, dim=1).double()
