"""Reads the labels of images that came back from bins: the error that each put into its bin depends on its class."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from medpfl.attacks.bin_readout import Candidates
from medpfl.attacks.front import SECOND_WEIGHT, behind, front_of
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
    places = bins.bins(bins.values(candidates.images))
    places[torch.arange(len(places)), candidates.bins // size] = candidates.bins % size
    pattern = bins.per_bin(bins.active(places).T)
    found = torch.linalg.lstsq(pattern, bins.per_bin(bias)[:, None], driver="gelsd").solution
    images = candidates.images.to(bias.device, torch.float32)
    labels: Tensor = (found - errors(model, images, examples, batch_norm)).abs().argmin(dim=1)
    return labels


def errors(model: GlobalModel, images: Tensor, examples: int, batch_norm: Literal["train", "eval"]) -> Tensor:
    """What the bias of an active unit gets as gradient from each image, for each class: (M, classes), float64.

    The second layer's columns must all be equal.
    """
    body = behind(model)
    with torch.no_grad():
        inputs = front_of(model, images)
    column = model.parameters[SECOND_WEIGHT][:, 0].double()
    found = []
    for label in range(model.task.classes):
        fed = inputs.detach().clone().requires_grad_()
        output, _ = body.forward(fed, batch_norm=batch_norm)
        loss = model.task.loss(output, torch.full((len(images),), label, device=images.device)) * len(images) / examples
        (gradient,) = torch.autograd.grad(loss, fed)
        found.append(gradient.flatten(1).double() @ column)
    return torch.stack(found, dim=1)
