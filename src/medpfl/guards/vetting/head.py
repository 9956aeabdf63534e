"""Last layers that let a single class, or a single image of it, send a gradient: fishing."""

from __future__ import annotations

import torch

from medpfl.guards.vetting.base import Evidence, Measured, check

FISHING = "Wen et al.: Fishing for User Data in Large-Batch Federated Learning, ICML 2022"

SAME_ROW = 1e-3
"""Distance of two classes' rows, as a share of the largest one, up to which they are the same row."""


@check(
    "equal_classes",
    about="structure",
    means="crafted",
    threshold=0.1,
    summary="classes of the last layer with equal rows, so that only the others send a gradient",
    paper=FISHING,
    limits="needs three classes; a layer of zeros only, as for fine-tuning, is left alone",
)
def equal_classes(evidence: Evidence) -> Measured | None:
    """The share of classes whose row equals another's, where not all do. Adding one vector to all rows changes nothing."""
    head = evidence.layers.head
    if head is None or len(head.weight) < 3:
        return None
    rows = head.weight.double()
    distances = torch.cdist(rows, rows)
    largest = float(distances.max())
    equal = (distances <= SAME_ROW * largest).sum(dim=1) > 1
    share = float(equal.double().mean()) if largest > 0 else 0.0
    return Measured(share, head.name, f"{int(equal.sum())} of {len(rows)} classes have the same row, others another")


@check(
    "class_offsets",
    about="structure",
    means="crafted",
    threshold=10.0,
    summary="biases of the last layer so far apart that some classes have no probability whatever the image shows",
    paper=FISHING,
    limits="shares of classes differ by less than e^10 in any training set; smaller offsets, with which other classes' "
    "images still send a little, pass",
)
def class_offsets(evidence: Evidence) -> Measured | None:
    """The range of the last layer's biases. Adding one number to all of them changes nothing."""
    head = evidence.layers.head
    if head is None or head.bias is None or len(head.bias) < 2:
        return None
    gap = float(head.bias.double().max() - head.bias.double().min())
    return Measured(gap, head.name, f"the biases of two classes differ by {gap:.3g}, a factor of e^{gap:.3g} in odds")
