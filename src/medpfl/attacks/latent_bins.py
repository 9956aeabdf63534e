"""Bins inside a model that has two dense layers of its own: they sort images by the mean of what comes before them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from medpfl.attacks.balance import balanced
from medpfl.attacks.bin_readout import Candidates, between_neighbors, read_bins
from medpfl.attacks.brightness_bins import alone, bin_counts, smoothed_edges
from medpfl.attacks.calibration import Trial, how_it_went, judged, sought
from medpfl.attacks.crafted import ServerView
from medpfl.attacks.layers import DenseLayer, dense_layer, layer_input
from medpfl.attacks.sizes import GAIN, Sizes, called, sizes
from medpfl.attacks.updates import gradient_view
from medpfl.core.domain import Batch, Broadcast, GlobalModel, Observation, Tensors

PROBES = 4
"""Random images on which the layers' wiring is looked at."""

AT_ONCE = 256
"""Auxiliary images whose latents are computed together."""


@dataclass(frozen=True)
class HiddenLayer:
    """A dense layer with ReLU (K units, F inputs) and the dense layer that follows; the inputs are the latents."""

    first: DenseLayer
    second: DenseLayer
    units: int
    features: int


def hidden_layer(model: GlobalModel) -> HiddenLayer | str:
    """The first two dense layers of a model if one ReLU and nothing else lies between them, or why there are none."""
    names = [name for name, tensor in model.parameters.items() if tensor.ndim == 2]
    if len(names) < 2:
        return "the model has no two dense layers, of which the first could be made to sort images"
    first, second = (dense_layer(model, name) for name in names[:2])
    if first.bias is None:
        return f"the dense layer '{first.module}' has no bias, which the bins need"
    seen: dict[str, list[Tensor]] = {"input": [], "output": [], "next": []}

    def around(_module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
        seen["input"].append(arguments[0])
        seen["output"].append(output)

    def before(_module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        seen["next"].append(arguments[0])

    handles = [
        model.module.get_submodule(first.module).register_forward_hook(around),
        model.module.get_submodule(second.module).register_forward_pre_hook(before),
    ]
    try:
        with torch.no_grad():
            model.forward(random_images(model, PROBES))
    finally:
        for handle in handles:
            handle.remove()
    once = all(len(tensors) == 1 and tensors[0].ndim == 2 for tensors in seen.values())
    if not once or not torch.equal(torch.relu(seen["output"][0]), seen["next"][0]):
        return f"between the dense layers '{first.module}' and '{second.module}' lies something else than one ReLU"
    units, features = model.parameters[first.weight].shape
    return HiddenLayer(first, second, int(units), int(features))


def random_images(model: GlobalModel, count: int) -> Tensor:
    """Noise in [0, 1] of the model's shape, precision and device, always the same."""
    like = next(iter(model.parameters.values()))
    generator = torch.Generator().manual_seed(0)
    return torch.rand((count, *model.image_shape), generator=generator, dtype=torch.float64).to(like)


def latents(model: GlobalModel, layer: HiddenLayer, images: Tensor) -> Tensor:
    """What the dense layer receives for images (N, C, *spatial): (N, F)."""
    dtype = model.parameters[layer.first.weight].dtype
    with torch.no_grad():
        parts = [layer_input(model, layer.first, part.to(dtype)) for part in torch.split(images, AT_ONCE)]
    return torch.cat(parts)


@dataclass(frozen=True)
class LatentBins:
    """The two dense layers, made so that unit k is active for images whose mean latent is above edge k.

    As in `leakage_module.LeakageModule`: rows scale / F, biases -scale * edge_k, and equal columns of the next layer,
    gain * direction / (scale * K). edges: (K,) float64, rising. direction: (outputs of the next layer,) of length 1.
    """

    layer: HiddenLayer
    edges: Tensor
    direction: Tensor
    scale: float
    gain: float

    def inside(self, model: GlobalModel) -> GlobalModel:
        """`model` with these tensors in the two layers."""
        units, features = self.layer.units, self.layer.features
        column = self.gain * self.direction / (self.scale * units)
        assert self.layer.first.bias is not None  # `hidden_layer` sees to that
        tensors = {
            self.layer.first.weight: torch.full((units, features), self.scale / features),
            self.layer.first.bias: -self.scale * self.edges,
            self.layer.second.weight: column[:, None].repeat(1, units),
        }
        placed = {name: tensor.to(model.parameters[name]) for name, tensor in tensors.items()}
        return replace(model, parameters={**model.parameters, **placed})


def binned_latents(
    view: ServerView,
    layer: HiddenLayer,
    *,
    scale: float | None,
    gain: float | None,
    secret: Tensors,
    notes: Sequence[str],
    generator: torch.Generator,
) -> Broadcast:
    """`view.model` with bins of equal mass in its dense layers, as it is sent to all clients.

    scale and gain: None to calibrate them on auxiliary images, which needs the recipe. secret, notes: added to the broadcast's.
    """
    auxiliary = view.knowledge.auxiliary
    assert auxiliary is not None  # the attacks see to that
    owned = latents(view.model, layer, auxiliary.images).double()
    values = owned.mean(dim=1)
    bins = LatentBins(
        layer=layer,
        edges=smoothed_edges(values, layer.units, first=float(values.min() - values.std() - 1e-6)),
        direction=_direction(int(view.model.parameters[layer.second.weight].shape[0]), generator),
        scale=1.0,
        gain=GAIN if gain is None else gain,
    )
    model = balanced(view.model, bins.inside, auxiliary.images, view.recipe)
    low, high = owned.min(), owned.max()
    everything = {**secret, "edges": bins.edges, "low": low, "range": (high - low).clamp_min(1e-12)}

    def sent(chosen: Sizes, floor: float = 0.0, more: Sequence[str] = ()) -> Broadcast:
        crafted = replace(bins, scale=chosen.scale, gain=chosen.gain).inside(model)
        return Broadcast((crafted,), {**everything, "floor": torch.tensor(floor)}, (*notes, *more))

    def tried(batches: Sequence[Batch], observation: Observation) -> Trial:
        images = torch.cat([batch.images for batch in batches])
        true = latents(view.model, layer, images).double()
        gradient = gradient_view(observation).tensors
        assert layer.first.bias is not None  # `hidden_layer` sees to that
        empty = bin_counts(true.mean(dim=1), bins.edges) == 0
        steps = between_neighbors(gradient[layer.first.bias])[empty].abs()
        floor = float(steps.max()) if len(steps) else 0.0
        readable = (true[alone(true.mean(dim=1), bins.edges)] - low) / everything["range"]
        return judged(readable, read_latents(observation, layer, floor).images, floor)

    if view.recipe is None:
        assert scale is not None  # the attacks' `why_not` sees to that
        return sent(Sizes(scale, bins.gain))
    names, search = (layer.first.weight, layer.first.bias or ""), sizes(view.recipe, scale, gain)
    chosen, trial = sought(view, search, sent, tried, leaking=view.clients, names=names, generator=generator)
    note = how_it_went(called(search, chosen), len(search.first) > 1, trial, "the latents alone in their bin")
    return sent(chosen, trial.floor, (note,))


def read_latents(observation: Observation, layer: HiddenLayer, floor: float) -> Candidates:
    """The latents (M, F) that the update shows, as shares of the range that auxiliary ones have."""
    assert observation.broadcast is not None  # the callers see to that
    assert layer.first.bias is not None  # `hidden_layer` sees to that
    secret, gradient = observation.broadcast.secret, gradient_view(observation).tensors
    weight, bias = gradient[layer.first.weight], gradient[layer.first.bias]
    low, range_ = float(secret["low"]), float(secret["range"])
    shares = (weight - low * bias[:, None]) / range_
    return read_bins(shares, bias, (secret["edges"] - low) / range_, (layer.features,), observation.examples, floor)


def _direction(rows: int, generator: torch.Generator) -> Tensor:
    """A random direction of length 1 whose entries cancel: adding the same to all outputs changes no class."""
    direction = torch.randn(rows, dtype=torch.float64, generator=generator)
    centered = direction - direction.mean() if rows > 1 else direction
    unit: Tensor = centered / centered.norm()
    return unit
