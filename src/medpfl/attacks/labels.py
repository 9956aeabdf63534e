"""Infers the labels of a batch from the update of the classification layer.

Only two tensors are read: the last two-dimensional trainable tensor (one row per class) and the bias of the same
module, both found by name (`medpfl.attacks.layers.last_dense`). The exact relation behind everything here, for the
mean cross entropy of b images with softmax outputs p and k_i images of class i, is

    d loss / d bias_i = mean(p_i) - k_i / b

so for one image exactly one entry is negative, and it is the label's (Zhao et al. 2020, iDLG, section 3.2, with the
weight's rows where there is no bias). For several images the counts follow from an estimate of mean(p): the outputs
of the class mean features dW_j / db_j, solved for k and rounded to sum b (the rule of iLRG, 2023). For independent
classes (binary cross entropy) the sign of each entry tells whether the class is present in a single image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from medpfl.attacks.layers import DenseLayer, last_dense, layer_input, why_no_single_input
from medpfl.attacks.updates import batch_norm_mode, gradient_view
from medpfl.core.domain import GlobalModel, Observation

PROBES = 16
"""Uniform random images that the attacker runs through the model to learn its typical features and outputs."""

NOISE_MARGIN = 1e-3
"""Bias entries of one softmax sum to zero; a relative sum above this means that noise was added."""

ROUNDING = 1e-6
"""Sums below this are rounding of a float32 softmax, not noise."""


@dataclass(frozen=True)
class LabelInference:
    """What the update says about the labels.

    labels: (b,) int64 in ascending order, or (1, classes) float for multi-label data; None where `reason` says why.
    confidence: 1 where the entries leave no doubt, towards 0 where the choice is a coin flip.
    """

    labels: Tensor | None
    confidence: float = 0.0
    notes: tuple[str, ...] = ()
    reason: str | None = None


def why_no_labels(model: GlobalModel, examples: int) -> str | None:
    """The reason why labels cannot be inferred for such a model and that many images; None if they can."""
    layer = last_dense(model)
    if isinstance(layer, str):
        return f"labels cannot be inferred: {layer}"
    if model.task.name == "multi_label" and examples > 1:
        return "labels cannot be inferred: a multi-label batch shows how often a class occurs, not in which image"
    if layer.bias is None and (reason := why_no_single_input(model, layer)) is not None:
        return f"labels cannot be inferred: {reason}"
    return None


def infer_labels(observation: Observation) -> LabelInference:
    """Labels of all private images of one observation, from its update alone."""
    model, examples = observation.model, observation.examples
    if (reason := why_no_labels(model, examples)) is not None:
        return LabelInference(None, reason=reason)
    layer = last_dense(model)
    assert isinstance(layer, DenseLayer)
    view = gradient_view(observation)
    bias_gradient, notes = _bias_gradient(observation, layer, view.tensors)
    notes = (*view.notes, *notes)
    if not bool(torch.isfinite(bias_gradient).all()):
        return LabelInference(None, reason="labels cannot be inferred: the last layer's update is not finite")
    if model.task.name == "multi_label":
        present = (bias_gradient < 0).to(torch.float32)
        spread = bias_gradient.abs()
        confidence = float(spread.min() / spread.max().clamp_min(torch.finfo(torch.float64).tiny))
        return LabelInference(present[None], confidence, notes)
    if examples == 1:
        return _single(bias_gradient, notes)
    return _counts(observation, layer, view.tensors, bias_gradient, notes)


def round_to_sum(estimate: Tensor, total: int) -> Tensor:
    """The whole numbers >= 0 with sum `total` that are nearest to `estimate` (classes,), however far off that is.

    The estimate is moved to the nearest point of the simplex; there the floors go up by the largest remainders.

    >>> round_to_sum(torch.tensor([0.9, -0.2, 1.4]), 2).tolist()
    [1, 0, 1]
    >>> round_to_sum(torch.tensor([3e12, -5e11, 7.0]), 2).tolist()
    [2, 0, 0]
    """
    projected = _on_simplex(estimate.double().nan_to_num(), total)
    counts = projected.floor().long()
    lacking = total - int(counts.sum())
    if lacking > 0:
        counts[(projected - counts).argsort(descending=True, stable=True)[:lacking]] += 1
    return counts


def _on_simplex(point: Tensor, total: int) -> Tensor:
    """The nearest point with entries >= 0 and sum `total` (Held, Wolfe, Crowder 1974)."""
    from_top = point - point.max()
    ordered = from_top.sort(descending=True).values
    ranks = torch.arange(1, len(point) + 1, dtype=point.dtype)
    thresholds = (ordered.cumsum(0) - total) / ranks
    kept = int((ordered > thresholds).sum())
    return (from_top - thresholds[kept - 1]).clamp(0.0, float(total))


def _bias_gradient(
    observation: Observation, layer: DenseLayer, gradients: dict[str, Tensor]
) -> tuple[Tensor, tuple[str, ...]]:
    """The last bias gradient (classes,): as sent, or rebuilt from the weight's rows, or both averaged under noise."""
    single_label = observation.model.task.name == "single_label"
    if layer.bias is not None:
        direct = gradients[layer.bias]
        noisy = single_label and float(direct.sum().abs()) > max(NOISE_MARGIN * float(direct.abs().sum()), ROUNDING)
        if not noisy or why_no_single_input(observation.model, layer) is not None:
            return direct, ()
    mean = _probe_features(observation, layer).mean(dim=0)
    projected = gradients[layer.weight] @ mean
    if layer.bias is None:
        return projected / mean.square().sum().clamp_min(1e-300), ("labels from the last weight's rows, no bias",)
    averaged = (projected + gradients[layer.bias]) / (mean.square().sum() + 1.0)
    return averaged, ("the last bias gradient does not sum to zero: noise was added, the weight's rows were used too",)


def _single(bias_gradient: Tensor, notes: tuple[str, ...]) -> LabelInference:
    order = bias_gradient.sort()
    lowest, label = float(order.values[0]), order.indices[:1]
    if len(bias_gradient) == 1:
        return LabelInference(label, 1.0, notes)
    margin = (float(order.values[1]) - lowest) / max(abs(lowest), 1e-300)
    confidence = max(0.0, min(1.0, margin))
    if lowest == 0.0:
        notes = (
            *notes,
            "the model is so sure of the label that rounding removed the label's own error from the update",
        )
    if confidence < 0.5:
        notes = (*notes, f"label ambiguous: classes {int(label)} and {int(order.indices[1])} are nearly equally likely")
    return LabelInference(label, confidence, notes)


def _counts(
    observation: Observation,
    layer: DenseLayer,
    gradients: dict[str, Tensor],
    bias_gradient: Tensor,
    notes: tuple[str, ...],
) -> LabelInference:
    """Solves sum_j k_j p_ji - k_i = b db_i, sum k = b for the counts k, p_j being class j's estimated outputs."""
    examples, classes = observation.examples, len(bias_gradient)
    outputs = _class_outputs(observation, layer, gradients, bias_gradient)
    system = torch.cat([outputs.T - torch.eye(classes, dtype=torch.float64), torch.ones(1, classes).double()])
    right = torch.cat([examples * bias_gradient, torch.tensor([float(examples)]).double()])
    estimate = torch.linalg.lstsq(system, right, driver="gelsd").solution
    counts = round_to_sum(estimate, examples)
    error = float((estimate - counts).abs().max())
    confidence = max(0.0, 1.0 - 2.0 * error)
    if confidence < 0.5:
        notes = (*notes, f"label counts are uncertain: the estimate misses whole numbers by up to {error:.2f}")
    return LabelInference(torch.arange(classes).repeat_interleave(counts), confidence, notes)


def _class_outputs(
    observation: Observation, layer: DenseLayer, gradients: dict[str, Tensor], bias_gradient: Tensor
) -> Tensor:
    """Estimated softmax output per class (classes, classes): of its mean feature, or of random images without one."""
    model = observation.model
    if layer.bias is None or why_no_single_input(model, layer) is not None:
        return _probe_outputs(observation).expand(len(bias_gradient), -1)
    weight, bias = model.parameters[layer.weight].double(), model.parameters[layer.bias].double()
    features = gradients[layer.weight] / torch.where(bias_gradient == 0, 1e-300, bias_gradient)[:, None]
    outputs = torch.softmax(features @ weight.T + bias, dim=1)
    usable = torch.isfinite(outputs).all(dim=1, keepdim=True)
    return torch.where(usable, outputs, _probe_outputs(observation))


def _probe_features(observation: Observation, layer: DenseLayer) -> Tensor:
    """What the last layer receives for random images (PROBES, inputs), as float64."""
    model, mode = observation.model, batch_norm_mode(observation.recipe)
    with torch.no_grad():
        return layer_input(model, layer, _probe_images(model), batch_norm=mode).double()


def _probe_outputs(observation: Observation) -> Tensor:
    """Mean softmax output (classes,) over random images, as float64."""
    model = observation.model
    with torch.no_grad():
        output, _ = model.forward(_probe_images(model), batch_norm=batch_norm_mode(observation.recipe))
    return torch.softmax(output.double(), dim=1).mean(dim=0)


def _probe_images(model: GlobalModel) -> Tensor:
    """Uniform noise in the model's own precision, always the same."""
    dtype = next(iter(model.parameters.values())).dtype
    return torch.rand((PROBES, *model.image_shape), generator=torch.Generator().manual_seed(0), dtype=dtype)
