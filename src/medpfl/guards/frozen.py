"""Frozen layers at work: what they get and give, and what somebody who knows them undoes in an update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from medpfl.core.domain import Batch, GlobalModel, Tensors
from medpfl.guards.layer_views import LayerView, layer_views


def frozen_views(
    model: GlobalModel, batch: Batch, batch_norm: Literal["train", "eval"] = "eval"
) -> tuple[LayerView, ...]:
    """Dense layers and convolutions whose weights no client trains, seen as `layer_views` sees trained ones.

    The model is not run where it has none.
    """
    frozen = {name: tensor for name, tensor in model.constants.items() if tensor.is_floating_point()}
    if not any(tensor.ndim >= 2 and name in dict(model.module.named_parameters()) for name, tensor in frozen.items()):
        return ()
    others = {name: tensor for name, tensor in model.constants.items() if name not in frozen}
    thawed = replace(model, parameters={**model.parameters, **frozen}, constants=others)
    return tuple(view for view in layer_views(thawed, batch, batch_norm)[0] if view.weight in frozen)


def unmixed(
    model: GlobalModel, views: Sequence[LayerView], frozen: Sequence[LayerView], gradient: Tensors
) -> list[tuple[LayerView, LayerView, Tensor]]:
    """Trained dense layers with a frozen one right behind, both as one layer, and the gradient of its rows.

    With frozen weights M behind trained ones W, units are the rows of M W, and dL/dW = M^T E X holds their errors E on
    the samples X mixed: whoever knows M undoes that by its pseudoinverse. Returns the trained layer's view, that of
    both together, and E X (units of M, inputs of W).
    """
    found = []
    for behind in frozen:
        before = next((view for view in views if _follows(model, behind, view)), None)
        if before is None or before.weight not in gradient:
            continue
        path = f"{before.path} and {behind.path}"
        undone = torch.linalg.pinv(model.constants[behind.weight].double()).T @ gradient[before.weight].double()
        found.append((before, replace(before, path=path, errors=behind.errors), undone))
    return found


def _follows(model: GlobalModel, behind: LayerView, before: LayerView) -> bool:
    """Whether what one dense layer gets is what another gives, with nothing in between."""
    if behind.convolution or before.convolution or (behind.inputs, behind.count) != (before.units, before.count):
        return False
    given: Tensor = before.samples() @ model.parameters[before.weight].detach().T
    if before.bias is not None:
        given = given + model.parameters[before.bias].detach()
    return bool(torch.allclose(behind.samples(), given, rtol=1e-3, atol=1e-5 * float(given.abs().max())))
