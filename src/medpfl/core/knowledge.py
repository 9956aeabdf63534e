"""What a threat model can grant: knowledge beyond what every adversary has, and what a malicious server may change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from medpfl.core.mechanisms import Mechanism

KNOWLEDGE: Mapping[str, str] = {
    "labels": "the victim's true labels (oracle)",
    "masks": "the victim's true segmentation masks (oracle)",
    "logits": "the model's outputs on the private images (oracle)",
    "batch_norm_statistics": "the exact batch statistics of the private batch (oracle)",
    "auxiliary": "images of other patients from the pool's auxiliary part, or of another data entry",
    "defense": "the mechanism of the client's defense",
}
"""What a threat model can grant beyond what every adversary knows, with its meaning."""

ORACLES = frozenset({"labels", "masks", "logits", "batch_norm_statistics"})
"""Knowledge that a real adversary would not have."""


CAPABILITIES: Mapping[str, str] = {
    "parameters": "chooses the tensors that it sends",
    "architecture": "chooses the architecture that it sends",
    "inconsistent_models": "sends different models to different clients",
    "recipe": "chooses learning rate and into how many local steps clients divide their images",
    "secure_aggregation": "chooses the aggregation's clipping and quantization",
}
"""What a threat model can let a malicious server change, with its meaning."""


@dataclass(frozen=True)
class Auxiliary:
    """Images that the adversary owns: (M, C, *spatial) in [0, 1] with targets, disjoint from all victims."""

    images: Tensor
    targets: Tensor


@dataclass(frozen=True)
class Knowledge:
    """Granted knowledge. A field is None unless the threat model grants it and the attack declares that it reads it."""

    labels: Tensor | None = None
    masks: Tensor | None = None
    logits: Tensor | None = None
    batch_norm_statistics: Mapping[str, Tensor] | None = None
    auxiliary: Auxiliary | None = None
    defense: Mechanism | None = None
