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

PLACES = 16
"""Points of the errors' curve that are computed: between so many it is straight as far as telling classes apart goes."""


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
    values = (candidates.images.flatten(1) @ bins.rows.T.to(candidates.images)).double()
    places = bins.bins(values)
    places[torch.arange(len(places)), candidates.bins // size] = candidates.bins % size
    pattern = bins.per_bin(bins.active(places).T)
    found = torch.linalg.lstsq(pattern, bins.per_bin(bias)[:, None], driver="gelsy").solution
    labels: Tensor = (found - errors(model, values, bins, examples, batch_norm)).abs().argmin(dim=1)
    return labels


def errors(
    model: GlobalModel, values: Tensor, bins: QueryBins, examples: int, batch_norm: Literal["train", "eval"]
) -> Tensor:
    """What the bias of an active unit gets as gradient from each image, for each class: (M, classes), float64.

    values: (M, Q), what the queries measure of the images. All that the module passes on of an image is one number, so
    that the errors of many lie on a curve, which is computed at `PLACES` and taken as straight between them. Costs one
    forward pass of the model behind the module, and a backward pass for each class.
    """
    column = model.parameters[SECOND_WEIGHT][:, 0].contiguous()
    first = model.parameters[WEIGHT][0].double() @ bins.rows[0] / bins.rows[0].square().sum()
    hidden = first * (values[:, :, None] - bins.edges).clamp_min(0).sum(dim=(1, 2))
    shown = hidden
    if batch_norm == "eval" and len(hidden) > PLACES:  # in training mode, images change each other's errors
        shown = torch.linspace(0, 1, PLACES).to(hidden) * (hidden.max() - hidden.min()) + hidden.min()
    inputs = model.parameters[SECOND_BIAS] + shown.float()[:, None] * column
    inputs = inputs.reshape(len(shown), *model.image_shape).requires_grad_()
    output, _ = behind(model).forward(inputs, batch_norm=batch_norm)
    found = []
    for label in range(model.task.classes):
        loss = model.task.loss(output, torch.full((len(shown),), label, device=inputs.device)) * len(shown) / examples
        (gradient,) = torch.autograd.grad(loss, inputs, retain_graph=True)
        found.append(gradient.flatten(1) @ column)
    return _between(torch.stack(found, dim=1).double(), shown, hidden)


def _between(values: Tensor, places: Tensor, wanted: Tensor) -> Tensor:
    """Values (P, ...) at rising places (P,) of a line, or at those that are wanted anyway, at wanted ones (M,)."""
    if places is wanted:
        return values
    above = torch.searchsorted(places, wanted).clamp(1, len(places) - 1)
    low, high = places[above - 1], places[above]
    share = ((wanted - low) / (high - low).clamp_min(torch.finfo(low.dtype).tiny)).clamp(0, 1)
    return torch.lerp(values[above - 1], values[above], share[:, None])
