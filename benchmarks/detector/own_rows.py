"""Traps in the first layer of a net that is dense first anyway, by an attacker who knows the checks."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from detector.data import Draw
from detector.forms import OwnRows
from detector.honest import new_model, trained
from medpfl.attacks.balance import balanced
from medpfl.attacks.first_layer_readout import FirstLayerReadout
from medpfl.attacks.layers import DenseLayer, first_dense
from medpfl.attacks.trap_weights import inputs_of
from medpfl.core.domain import GlobalModel, Observation, Recipe, Reconstruction

BODIES = ("mlp_relu", "mlp_wide")
STEPS = 40
HALVINGS = 30


def own_rows(form: OwnRows, draw: Draw, recipe: Recipe, generator: torch.Generator) -> tuple[GlobalModel, GlobalModel]:
    """An honest net, and what its server sends: each trap is on for about one image of the client's batch."""
    model = new_model(BODIES[int(torch.randint(len(BODIES), (), generator=generator))], draw, generator)
    if form.trained:
        model = trained(model, draw.batch(draw.others), STEPS, generator)
    layer, images = _dense(model), draw.batch(draw.auxiliary).images
    assert layer.bias is not None
    weight, bias = model.parameters[layer.weight].double(), model.parameters[layer.bias].double()
    seen, share = inputs_of(model, layer, images).double(), 1 / recipe.batch_size
    rows, thresholds = _traps(form, weight, seen, share, generator)
    chosen = torch.randperm(len(weight), generator=generator)[: round(form.share * len(weight))]
    weight, bias = weight.clone(), bias.clone()
    weight[chosen], bias[chosen] = rows[chosen], thresholds[chosen]
    placed = {layer.weight: weight.float(), layer.bias: bias.float()}

    def with_traps(honest: GlobalModel) -> GlobalModel:
        return replace(honest, parameters={**honest.parameters, **placed})

    return model, with_traps(balanced(model, with_traps, images, recipe))


def _traps(
    form: OwnRows, weight: Tensor, seen: Tensor, share: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Rows and biases of which the mean unit is on for this share of what the layer gets."""
    deviation = weight.std()
    rows = weight if form.trained else deviation * torch.randn(weight.shape, generator=generator, dtype=torch.float64)
    if not form.shifted:
        place = max(1, round((1 - share) * len(seen)))
        return rows, -(seen @ rows.T).kthvalue(place, dim=0).values
    values, sums = seen @ rows.T, seen.sum(dim=1, keepdim=True)
    low, high = 0.0, float(10 * deviation)
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        often = float((values - middle * sums > 0).double().mean()) > share
        low, high = (middle, high) if often else (low, middle)
    return rows - high, torch.zeros(len(rows), dtype=torch.float64)


def read_own(observation: Observation) -> Tensor:
    """Images that the first layer's units hold alone."""
    (found,) = FirstLayerReadout().reconstruct([observation], [torch.Generator()])
    return (
        found.images
        if isinstance(found, Reconstruction)
        else observation.model.parameters[_dense(observation.model).weight][:0]
    )


def _dense(model: GlobalModel) -> DenseLayer:
    layer = first_dense(model)
    assert not isinstance(layer, str), layer
    return layer
