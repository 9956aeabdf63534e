"""Group norm in place of batch norm: what makes a model fit for per-example defenses."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from medpfl.core.config import STRICT
from medpfl.core.domain import GlobalModel
from medpfl.defenses.base import DEFENSES, Defense
from medpfl.models.group_norm import with_group_norm


@DEFENSES.register(
    "group_norm",
    summary="the federation agrees on group norm in place of batch norm, so that no batch statistics exist or are sent",
    paper="Wu, He: Group Normalization, ECCV 2018; the replacement as in Opacus's ModuleValidator",
    limits="no defense against matching: an image's gradient becomes easier to invert, not harder; loaded weights need "
    "training after the change",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class GroupNorm(Defense):
    """gcd(32, channels) groups. Listed before dp_sgd or fed_cdp in a composition, it gives them a model that they accept."""

    def model(self, model: GlobalModel) -> GlobalModel:
        """The model without batch norm, with the same weights."""
        return with_group_norm(model)
