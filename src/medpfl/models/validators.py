"""What an audit of a model will and will not mean: one function per property, each with its reason."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from medpfl.core.domain import GlobalModel, Recipe
from medpfl.core.errors import ModelError
from medpfl.core.tasks import MultiLabel, Segmentation
from medpfl.models.inspection import VALIDATORS, Finding, Inspection
from medpfl.models.probe import probe, probe_images

PIECEWISE_LINEAR = frozenset(
    {"relu", "relu_", "relu6", "leaky_relu", "leaky_relu_", "prelu", "rrelu", "rrelu_", "hardtanh", "hardtanh_"}
    | {"threshold", "threshold_", "hardsigmoid", "hardshrink", "softshrink"}
)
"""PyTorch functions whose second derivative is zero wherever it exists."""

VANISHED = 1e-6
"""Outputs of two random images that differ by less than this are taken as equal."""

MAX_POOLING = frozenset(
    f"{kind}max_pool{axes}d{suffix}" for kind in ("", "adaptive_") for axes in "123" for suffix in ("", "_with_indices")
)


def validate(model: GlobalModel, recipe: Recipe | None = None, *, try_derivatives: bool = True) -> list[Finding]:
    """All findings about `model`, trained as `recipe` says: refusals first, then warnings, then the rest.

    Runs the model a few times on one or two random images; without `try_derivatives` forwards only, which takes
    about a tenth of the time.
    """
    inspection = Inspection(model, recipe, probe(model))
    chosen = [entry for entry in VALIDATORS if try_derivatives or entry.name != "derivatives"]
    order = {"refusal": 0, "warning": 1, "info": 2}
    findings = chain.from_iterable(entry.item(inspection) for entry in chosen)
    return sorted(findings, key=lambda finding: order[finding.severity])


@VALIDATORS.register("batch_norm", summary="what batch norm in train or eval mode means for the numbers")
def batch_norm(inspection: Inspection) -> Iterator[Finding]:
    """Batch statistics couple the images of a batch; running statistics do not."""
    layers = [layer for layer in inspection.model.module.modules() if getattr(layer, "functional_batch_norm", False)]
    if not layers:
        return
    recipe = inspection.recipe
    if recipe is not None and recipe.batch_norm == "train":
        yield Finding(
            "batch_norm_train",
            "warning",
            f"{len(layers)} batch norm layers in train mode: every image's gradient depends on the whole batch through "
            "statistics that the adversary does not know exactly, so attacks that assume eval mode look weaker than "
            "they are; the new running statistics are sent along and reveal the batch's mean and variance",
        )
        yield from _single_values(inspection, recipe)
    else:
        yield Finding(
            "batch_norm_eval",
            "warning",
            f"{len(layers)} batch norm layers in eval mode: the adversary knows their running statistics exactly, "
            "while clients usually train with batch statistics; take the numbers as an upper bound and audit "
            "batch_norm: train as well",
        )
    if "batch_norm" in inspection.probe.functions:
        yield Finding(
            "batch_norm_function",
            "warning",
            "the forward pass calls the batch_norm function itself; it always runs as in eval mode",
        )


def _single_values(inspection: Inspection, recipe: Recipe) -> Iterator[Finding]:
    rest = recipe.private_images % recipe.batch_size
    smallest = max(1, (rest or recipe.batch_size) // recipe.accumulation)
    try:
        with torch.no_grad():
            inspection.model.forward(probe_images(inspection.model, smallest), batch_norm="train")
    except ModelError as error:
        yield Finding("batch_norm_single_value", "refusal", f"batch size {smallest}: {error}")


@VALIDATORS.register("dropout", summary="dropout is off in audits")
def dropout(inspection: Inspection) -> Iterator[Finding]:
    """Dropout is randomness that an audit cannot share between client and adversary."""
    count = sum(isinstance(layer, _DropoutNd) and layer.p > 0 for layer in inspection.model.module.modules())
    if count or "dropout" in inspection.probe.functions:
        yield Finding(
            "dropout",
            "warning",
            "dropout is off in all audited passes: real clients train with random masks that the adversary does not "
            "know, so the numbers are an upper bound of what matching attacks reach",
        )


@VALIDATORS.register("last_layer", summary="whether labels and features can be read from the last layer")
def last_layer(inspection: Inspection) -> Iterator[Finding]:
    """Label inference and feature read-out use weights and bias of the last dense layer."""
    if isinstance(inspection.model.task, Segmentation):
        yield Finding(
            "masks_as_targets",
            "info",
            "the model is trained with masks, which no layer's gradient shows: attacks search them together with the "
            "images (dlg, gradinv) or are given the true ones (an oracle); attacks that infer labels refuse",
        )
        return
    last = inspection.last_layer
    if last is None:
        yield Finding(
            "last_layer_not_dense",
            "warning",
            "the model does not end in a dense layer with one output per class: labels cannot be inferred from its "
            "gradient, and feature_readout cannot run; attacks that infer labels are weaker than on usual classifiers",
        )
    elif last.module.bias is None:
        yield Finding(
            "last_layer_without_bias",
            "warning",
            f"the last layer '{last.path}' has no bias: labels cannot be inferred from the signs of its bias gradient, "
            "nor its input features from dW/db; attacks that need them say little about this model",
        )


@VALIDATORS.register("probabilities", summary="outputs must be scores before softmax or sigmoid")
def probabilities(inspection: Inspection) -> Iterator[Finding]:
    """The task's loss applies softmax or sigmoid itself."""
    output = inspection.probe.output
    if not bool(((output >= 0) & (output <= 1)).all()):
        return
    single = not isinstance(inspection.model.task, MultiLabel)
    sums = output.sum(dim=1)
    if (single and torch.allclose(sums, torch.ones_like(sums), atol=1e-3)) or (
        not single and "sigmoid" in inspection.probe.functions
    ):
        yield Finding(
            "outputs_are_probabilities",
            "warning",
            "the outputs look like probabilities, but the loss expects scores before softmax or sigmoid: take that "
            "last function out, or gradients and inferred labels are not those of real training",
        )


@VALIDATORS.register("signal", summary="outputs must depend on the image")
def signal(inspection: Inspection) -> Iterator[Finding]:
    """Deep untrained nets on untrained running statistics can lose the image on the way."""
    output = inspection.probe.output
    if bool((output[0] - output[1]).abs().max() <= VANISHED * output.abs().max().clamp_min(1.0)):
        yield Finding(
            "vanishing_signal",
            "warning",
            "two random images give the same outputs: in this state the update shows next to nothing of an image, which "
            "is no protection, because it ends with training; audit a trained state, or batch_norm: train",
        )


@VALIDATORS.register("activations", summary="piecewise linear activations have no second derivative")
def activations(inspection: Inspection) -> Iterator[Finding]:
    """Matching a gradient by gradient descent differentiates the activations twice."""
    found = inspection.uses(PIECEWISE_LINEAR)
    if found:
        yield Finding(
            "piecewise_linear_activations",
            "warning",
            f"activations without a second derivative ({', '.join(found)}): the matching objective is flat or jumps "
            "where units switch, so L-BFGS attacks (dlg, idlg, cpl) fail here without this being protection; "
            "judge by gradinv",
        )


@VALIDATORS.register("max_pooling", summary="max pooling passes the winners' gradient only")
def max_pooling(inspection: Inspection) -> Iterator[Finding]:
    """Positions that win nowhere leave no trace in later layers' gradients."""
    if inspection.uses(MAX_POOLING):
        yield Finding(
            "max_pooling",
            "info",
            "max pooling passes only the largest value of each window on, so matching attacks get no signal from the "
            "others and reconstruct less fine detail",
        )


@VALIDATORS.register("frozen_layers", summary="frozen tensors do not appear in the update")
def frozen_layers(inspection: Inspection) -> Iterator[Finding]:
    """What is not trained is not sent."""
    model = inspection.model
    frozen = {name for name, _ in model.module.named_parameters()} & set(model.constants)
    if frozen:
        entries = sum(model.constants[name].numel() for name in frozen)
        yield Finding(
            "frozen_layers",
            "info",
            f"{len(frozen)} frozen tensors ({entries} entries, first '{min(frozen)}') are not trained and not part of "
            f"the update, which has {model.parameter_count} trainable entries; unfreezing them later leaks more",
        )


@VALIDATORS.register("dense_first_layer", summary="a dense first layer leaks its input exactly")
def dense_first_layer(inspection: Inspection) -> Iterator[Finding]:
    """dW/db of a dense layer with bias is its input."""
    first = inspection.first_trainable_layer
    if first is None or not isinstance(first.module, nn.Linear):
        return
    if first.module.bias is None or first.module.in_features != inspection.pixels:
        return
    yield Finding(
        "dense_first_layer",
        "warning",
        f"the first trainable layer '{first.path}' is dense with a bias: for one image its gradient gives the image "
        "exactly (first_layer_readout), whatever comes after it; behind a ReLU batches come back too (peeling)",
    )


@VALIDATORS.register("size", summary="trainable entries per private pixel")
def size(inspection: Inspection) -> Iterator[Finding]:
    """Fewer equations than unknowns cannot determine the images without a prior."""
    images = 1 if inspection.recipe is None else inspection.recipe.private_images
    unknowns = images * inspection.pixels
    ratio = inspection.model.parameter_count / unknowns
    meaning = (
        "fewer equations than unknowns, so images are not determined without prior knowledge"
        if ratio < 1
        else "enough equations to determine the images in principle"
    )
    yield Finding(
        "parameters_per_pixel",
        "info",
        f"{inspection.model.parameter_count} trainable entries for {unknowns} private pixels "
        f"({ratio:.3g} each): {meaning}",
    )


@VALIDATORS.register("float16", summary="loss scaling skips first steps")
def float16(inspection: Inspection) -> Iterator[Finding]:
    """Dynamic loss scaling starts too high on purpose."""
    recipe = inspection.recipe
    if recipe is not None and recipe.precision == "float16" and recipe.update != "gradient":
        yield Finding(
            "float16_skipped_steps",
            "warning",
            "float16 starts each round with a loss scale of 65536, and steps that overflow are skipped: an update of "
            "few steps may be zero and hide what longer training would show",
        )
