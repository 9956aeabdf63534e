"""What the attacker knows of the statistics that batch norm layers took over the private batch.

Four kinds of knowledge: the running statistics of the model that it sent, which follow the data that the model was
trained on; the batch's own statistics, which an update with buffers shows exactly after one forward pass in train mode,
because the layer's momentum m is public: new = (1 - m) * old + m * batch; the exact private ones, granted (an oracle);
or none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from medpfl.core.devices import CPU, moved
from medpfl.core.domain import GlobalModel, Observation, Recipe, Tensors
from medpfl.models.batch_norm import FunctionalBatchNorm, Statistics, batch_norm_layers

StatisticsSource = Literal["auto", "given", "recovered", "running", "none"]
"""Which statistics an attack uses; `auto` takes the best that there are, in this order."""

NEGATIVE = 1e-5
"""A recovered variance may be negative by this share of the larger running variance, times 1 / momentum, as rounding."""

MEANINGS = {
    "given": "the exact ones of the private batch (oracle)",
    "recovered": "those of the private batch, recovered from the buffers in the update",
    "running": "the running ones of the received model",
}


@dataclass(frozen=True)
class KnownStatistics:
    """What an attacker with an observation knows: per layer mean and biased variance, in float64.

    source: where they come from, `none` where there are none. reason: why the source that was asked for shows nothing.
    note: half a sentence for the report.
    """

    layers: Statistics
    source: StatisticsSource
    note: str
    reason: str | None = None


def known_statistics(observation: Observation, source: StatisticsSource) -> KnownStatistics:
    """The statistics of the asked kind, on the CPU. Where they do not show, `reason` says why; `auto` never gives one."""
    observation = moved(observation, CPU)
    counts = values_per_channel(observation.model, observation.examples)
    if not counts:
        return KnownStatistics({}, "none", "no batch-norm statistics: the model has no batch norm")
    if source == "none":
        return KnownStatistics({}, "none", "no batch-norm statistics: left out")
    if source == "auto":
        return _best(observation, counts)
    found = _READERS[source](observation, counts)
    if isinstance(found, str):
        return KnownStatistics({}, "none", "", f"batch_norm_statistics: {source} is not to be had: {found}")
    return KnownStatistics(found, source, f"batch-norm statistics: {MEANINGS[source]}")


def why_not_recovered(model: GlobalModel, recipe: Recipe | None) -> str | None:
    """The reason why updates of clients with this recipe show no batch statistics; None if they may."""
    if recipe is None or not batch_norm_layers(model):
        return None
    if recipe.batch_norm == "eval":
        return "clients run batch norm in eval mode and do not take batch statistics"
    passes = recipe.local_steps * recipe.epochs * recipe.accumulation
    return None if passes == 1 else f"the buffers mix the statistics of {passes} forward passes"


def values_per_channel(model: GlobalModel, examples: int) -> dict[str, int]:
    """Batch norm layers that run exactly once, with how many values of each channel they see for so many images."""
    seen: dict[str, list[int]] = {}
    handles = [
        layer.register_forward_pre_hook(
            lambda _, inputs, path=path: seen.setdefault(path, []).append(inputs[0].numel() // inputs[0].shape[1])
        )
        for path, layer in batch_norm_layers(model).items()
    ]
    if not handles:
        return {}
    dtype = next(iter(model.parameters.values())).dtype
    try:
        with torch.no_grad():
            model.forward(torch.full((1, *model.image_shape), 0.5, dtype=dtype, device=model.device))
    finally:
        for handle in handles:
            handle.remove()
    return {path: examples * counts[0] for path, counts in seen.items() if len(counts) == 1}


def _best(observation: Observation, counts: dict[str, int]) -> KnownStatistics:
    for source in ("given", "recovered", "running"):
        found = _READERS[source](observation, counts)
        if source == "running" and never_ran(observation.model):
            continue
        if not isinstance(found, str):
            return KnownStatistics(found, source, f"batch-norm statistics: {MEANINGS[source]}")
    return KnownStatistics({}, "none", "no batch-norm statistics: the update shows none, and the model saw no data yet")


def never_ran(model: GlobalModel) -> bool:
    """Whether all running statistics are still those of a new layer, zeros and ones, which say nothing about data."""
    means = [tensor for name, tensor in model.buffers.items() if name.endswith("running_mean")]
    variances = [tensor for name, tensor in model.buffers.items() if name.endswith("running_var")]
    return not any(bool(mean.any()) for mean in means) and all(bool((one == 1).all()) for one in variances)


def _given(observation: Observation, counts: dict[str, int]) -> Statistics | str:
    granted = observation.knowledge.batch_norm_statistics
    if granted is None:
        return "batch statistics were not granted"
    return {path: (granted[f"{path}.mean"].double(), granted[f"{path}.variance"].double()) for path in counts}


def _running(observation: Observation, counts: dict[str, int]) -> Statistics | str:
    found = {path: _pair(observation.model.buffers, path) for path in counts}
    kept = {path: pair for path, pair in found.items() if pair is not None}
    return kept or "the model keeps no running statistics"


def _recovered(observation: Observation, counts: dict[str, int]) -> Statistics | str:
    """The batch's statistics: (new - (1 - m) * old) / m, the variance with Bessel's correction undone."""
    layers, found = batch_norm_layers(observation.model), Statistics()
    for path, count in counts.items():
        old, new = _pair(observation.model.buffers, path), _pair(observation.update.buffers, path)
        if old is None:
            continue
        if new is None:
            return "the update carries no buffers"
        if (passes := _forward_passes(observation, path)) != 1:
            return f"the buffers come from {passes} forward passes, not from one"
        momentum = _momentum(observation.model, layers[path], path)
        if momentum == 0.0 or count < 2:
            return f"layer '{path}' keeps nothing of a batch"
        mean, unbiased = (before + (after - before) / momentum for before, after in zip(old, new, strict=True))
        rounding = NEGATIVE / momentum * torch.maximum(old[1].amax(), new[1].amax())
        if not bool(torch.isfinite(unbiased).all()) or bool((unbiased < -rounding).any()):
            return f"the buffers of layer '{path}' were changed after training, its variance would be negative"
        found[path] = (mean, unbiased.clamp_min(0.0) * ((count - 1) / count))
    return found or "the model keeps no running statistics"


_READERS = {"given": _given, "recovered": _recovered, "running": _running}


def _pair(buffers: Tensors, path: str) -> tuple[Tensor, Tensor] | None:
    prefix = f"{path}." if path else ""
    mean, variance = buffers.get(f"{prefix}running_mean"), buffers.get(f"{prefix}running_var")
    return None if mean is None or variance is None else (mean.double(), variance.double())


def _forward_passes(observation: Observation, path: str) -> int:
    """How often the client ran the layer: what its counter says, else what the recipe says (0 in eval mode)."""
    name = f"{path}.num_batches_tracked" if path else "num_batches_tracked"
    old, new = observation.model.counters.get(name), observation.update.counters.get(name)
    if old is not None and new is not None:
        return int(new) - int(old)
    recipe = observation.recipe
    if recipe is None or recipe.batch_norm == "eval":
        return 0
    return recipe.local_steps * recipe.epochs * recipe.accumulation


def _momentum(model: GlobalModel, layer: FunctionalBatchNorm, path: str) -> float:
    """The share of the new statistics; without a momentum a layer averages over all forward passes."""
    if layer.momentum is not None:
        return float(layer.momentum)
    name = f"{path}.num_batches_tracked" if path else "num_batches_tracked"
    return 1.0 / (int(model.counters[name]) + 1)
