"""DLG: image and soft label are found together by matching gradients."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic.dataclasses import dataclass

from medpfl.attacks.base import ATTACKS
from medpfl.attacks.lbfgs_matching import PUBLISHED, QUICK, LBFGSMatching
from medpfl.attacks.matching.settings import Labels
from medpfl.core.config import STRICT


@ATTACKS.register(
    "dlg",
    summary="image and soft label together by L-BFGS on the squared gradient distance, normal start",
    paper="Zhu, Liu, Han: Deep Leakage from Gradients, NeurIPS 2019 (arXiv 1906.08935), algorithm 1",
    limits="smooth models (sigmoid, tanh); the joint search finds a wrong label now and then; small batches",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class DLG(LBFGSMatching):
    """1. Images and label logits start as normal noise. 2. L-BFGS over both on

        sum over all tensors of |gradient(images, softmax(logits)) - observed gradient|^2.

    3. The labels are those of the optimized logits. Multi-label models use a sigmoid in place of the softmax.
    Segmentation models have logits per pixel, which give the mask, unless the true masks are given.

    Where the update shows its output error d, the soft label is not searched: for every image the one that fits the
    last bias' gradient, softmax(outputs) - d, is put in, and the label is that of the final image. The published
    preset searches both: unit steps, 300 outer steps of 20, history 100, one start.
    """

    presets: ClassVar[dict[str, dict[str, Any]]] = {"published": PUBLISHED, "quick": QUICK}
    legacy_convention: ClassVar[str] = "range_1_8bit"
    label_source: ClassVar[Labels] = "soft"
