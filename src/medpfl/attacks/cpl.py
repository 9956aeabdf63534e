"""CPL: a tiled start and an inferred label make matching gradients faster and surer."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic.dataclasses import dataclass

from medpfl.attacks.base import ATTACKS
from medpfl.attacks.lbfgs_matching import PUBLISHED, QUICK, LBFGSMatching
from medpfl.core.config import STRICT


@ATTACKS.register(
    "cpl",
    summary="label from the last layer's gradient, start from a tiled 16x16 patch, L-BFGS on the squared distance",
    paper="Wei et al.: A Framework for Evaluating Client Privacy Leakages in Federated Learning, ESORICS 2020 "
    "(arXiv 2004.10397)",
    limits="smooth models (sigmoid, tanh) with a classification layer; single images or small batches",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class CPL(LBFGSMatching):
    """1. Labels from the last layer's gradient. 2. Images start as one random 16x16 patch, tiled. 3. L-BFGS on

        sum over all tensors of |gradient(images, labels) - observed gradient|^2.

    The published preset: unit steps, 300 outer steps of 20, history 100, one start.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {"published": PUBLISHED, "quick": QUICK}
    legacy_convention: ClassVar[str] = "range_0"
    initialization: ClassVar[str] = "tiled"
