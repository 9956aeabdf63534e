"""iDLG: the label is read from the last layer, then the image is found by matching gradients."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic.dataclasses import dataclass

from medpfl.attacks.base import ATTACKS
from medpfl.attacks.lbfgs_matching import PUBLISHED, QUICK, LBFGSMatching
from medpfl.core.config import STRICT


@ATTACKS.register(
    "idlg",
    summary="label from the last layer's gradient, image by L-BFGS on the squared gradient distance, normal start",
    paper="Zhao, Mopuri, Bilen: iDLG: Improved Deep Leakage from Gradients, 2020 (arXiv 2001.02610), algorithm 1",
    limits="smooth models (sigmoid, tanh) with a classification layer; single images or small batches",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class IDLG(LBFGSMatching):
    """1. Labels from the sign pattern of the last layer's gradient. 2. Images start as normal noise. 3. L-BFGS on

        sum over all tensors of |gradient(images, labels) - observed gradient|^2.

    The published preset: unit steps, 300 outer steps of 20, history 100, one start, end below 1e-6.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {"published": {**PUBLISHED, "stop_below": 1e-6}, "quick": QUICK}
    legacy_convention: ClassVar[str] = "range_0"
