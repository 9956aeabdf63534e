"""Infers the labels of a batch from the update of the classification layer.

Only two tensors are read: the last two-dimensional trainable tensor (one row per class) and the bias of the same
module, both found by name (`medpfl.attacks.layers.last_dense`). The exact relation behind everything here, for the
mean cross entropy of b images with softmax outputs p and k_i images of class i, is

    d loss / d bias_i = mean(p_i) - k_i / b

so for one image exactly one entry is negative, and it is the label's (Zhao et al. 2020, iDLG, section 3.2, with the
weight's rows where there is no bias). For several images the counts follow from an estimate of mean(p)
(`medpfl.attacks.label_counts`), rounded to sum b. For independent
classes (binary cross entropy) the sign of each entry tells whether the class is present in a single image.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from medpfl.attacks.dummy_images import dummy_images
from medpfl.attacks.label_counts import Moment, estimate_counts, round_to_sum
from medpfl.attacks.layers import DenseLayer, last_dense, layer_input, why_no_single_input
from medpfl.attacks.updates import batch_norm_mode, change, gradient_view
from medpfl.core.devices import CPU, moved
from medpfl.core.domain import GlobalModel, Observation, Tensors
from medpfl.federation.recipes import has_batch_norm

PROBES = 16
"""Uniform random images that the attacker runs through the model to learn its typical features and outputs."""

ON_THE_WAY = (0.1, 0.3, 0.5, 0.7, 0.9)
"""Shares of the change after several local steps at which outputs are estimated and averaged."""

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
    if model.task.name == "segmentation":
        return (
            "labels cannot be inferred: the model is trained with masks, which no layer's gradient shows; dlg and gradinv "
            "search masks with the images, and `masks: given` (an oracle) makes do with the true ones"
        )
    layer = last_dense(model)
    if isinstance(layer, str):
        return f"labels cannot be inferred: {layer}"
    if model.task.name == "multi_label" and examples > 1:
        return "labels cannot be inferred: a multi-label batch shows how often a class occurs, not in which image"
    if layer.bias is None and (reason := why_no_single_input(model, layer)) is not None:
        return f"labels cannot be inferred: {reason}"
    return None


def infer_labels(observation: Observation) -> LabelInference:
    """Labels of all private images of one observation, from its update alone; computed on the CPU, wherever it lives."""
    observation = moved(observation, CPU)
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
    """How often each class occurs in a batch, or in all batches of several local steps."""
    examples, model = observation.examples, observation.model
    if why_no_single_input(model, layer) is None:
        normalized = batch_norm_mode(observation.recipe) == "train" and has_batch_norm(model)
        moments = _moments(observation, layer)
        estimate = estimate_counts(moments, gradients[layer.weight], bias_gradient, examples, normalized)
    else:
        estimate = examples * (_probe_outputs(observation) - bias_gradient)
    counts = round_to_sum(estimate, examples)
    error = float((estimate - counts).abs().max())
    confidence = max(0.0, 1.0 - 2.0 * error)
    if confidence < 0.5:
        notes = (*notes, f"label counts are uncertain: the estimate misses whole numbers by up to {error:.2f}")
    return LabelInference(torch.arange(len(counts)).repeat_interleave(counts), confidence, notes)


def _moments(observation: Observation, layer: DenseLayer) -> list[Moment]:
    """The model that was sent and, where the client took several steps, models on the way to what came back."""
    before = observation.model.to(torch.float64).parameters
    start = _moment(observation, layer, before)
    recipe = observation.recipe
    if recipe is None or recipe.update == "gradient" or recipe.local_steps * recipe.epochs == 1:
        return [start]
    moved = change(observation)
    end = _moment(observation, layer, {name: tensor + moved[name] for name, tensor in before.items()})
    if not bool(torch.isfinite(end.features).all()):
        return [start]
    return [
        Moment(
            torch.lerp(start.weight, end.weight, passed),
            torch.lerp(start.bias, end.bias, passed),
            torch.lerp(start.features, end.features, passed),
        )
        for passed in ON_THE_WAY
    ]


def _moment(observation: Observation, layer: DenseLayer, parameters: Tensors) -> Moment:
    """The classification layer with these parameters, and its inputs for dummy images, one group after the other."""
    model, mode = observation.model, batch_norm_mode(observation.recipe)
    dtype = model.parameters[layer.weight].dtype
    own = {name: tensor.to(dtype) for name, tensor in parameters.items()}
    with torch.no_grad():
        features = [
            layer_input(model, layer, group, parameters=own, batch_norm=mode).double()
            for group in dummy_images(model.image_shape, dtype)
        ]
    weight = parameters[layer.weight]
    bias = weight.new_zeros(len(weight)) if layer.bias is None else parameters[layer.bias]
    return Moment(weight, bias, torch.cat(features))


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
