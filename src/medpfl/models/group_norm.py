"""Group norm in place of batch norm, for clients whose images must not look at each other."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

from torch import nn

from medpfl.core.domain import GlobalModel
from medpfl.models.batch_norm import FunctionalBatchNorm, replace_layers

GROUPS = 32
"""Groups at most (Wu and He: Group Normalization, ECCV 2018)."""


def with_group_norm(model: GlobalModel) -> GlobalModel:
    """The model with group norm of gcd(32, channels) groups in place of every batch norm layer, as Opacus's fixer has it.

    Weights keep names and values, those of the replaced layers too; running statistics and counters are gone. A model
    without batch norm is handed back as it is.
    """
    named = model.module.named_modules(remove_duplicate=False)
    paths = [path for path, layer in named if isinstance(layer, FunctionalBatchNorm)]
    if not paths:
        return model
    gone = {f"{path}.{name}" for path in paths for name in ("running_mean", "running_var", "num_batches_tracked")}
    return replace(
        model,
        name=f"{model.name} with group norm",
        module=replace_layers(copy.deepcopy(model.module), _group_norm).eval(),
        buffers={name: tensor for name, tensor in model.buffers.items() if name not in gone},
        counters={name: tensor for name, tensor in model.counters.items() if name not in gone},
        constants={name: tensor for name, tensor in model.constants.items() if name not in gone},
    )


def _group_norm(layer: nn.Module) -> nn.GroupNorm | None:
    if not isinstance(layer, FunctionalBatchNorm):
        return None
    groups, affine = math.gcd(GROUPS, layer.num_features), layer.weight is not None
    return nn.GroupNorm(groups, layer.num_features, eps=layer.eps, affine=affine)
