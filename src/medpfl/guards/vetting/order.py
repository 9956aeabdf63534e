"""What comes first: a dense layer in front of everything else sees the images themselves."""

from __future__ import annotations

from itertools import takewhile

from medpfl.guards.vetting.base import Evidence, Measured, check
from medpfl.guards.vetting.layers import Weighted, first_trained


@check(
    "dense_first",
    about="structure",
    means="leaks",
    threshold=0.0,
    summary="a dense layer with biases before all others: its gradient holds its input, honest or not",
    paper="Phong et al., IEEE TIFS 2018; Geiping et al., NeurIPS 2020, proposition 3.1",
    limits="goes by the order of the tensors in the file; behavior shows what is used first",
)
def dense_first(evidence: Evidence) -> Measured | None:
    """How many dense layers with biases come before any convolution, if the first layer is one."""
    first = first_trained(evidence.tensors, evidence.layers)
    if first is None:
        return None
    ahead = list(takewhile(lambda layer: layer.dense and layer.bias is not None, evidence.layers.all))
    if not first.dense or first.bias is None or _sees_no_images(evidence, first):
        return Measured(0.0, first.name, "the first layer is no dense layer with biases that sees whole images")
    before = " and stands before the first convolution" if evidence.layers.convolutions else ""
    seen = f"the first layer is dense with biases{before}, so its gradient gives single images away"
    return Measured(float(len(ahead)), first.name, seen)


@check(
    "front_layers",
    about="structure",
    means="crafted",
    threshold=0.0,
    summary="dense layers from image to image before the first convolution, where nobody needs them",
    paper="Fowl et al.: Robbing the Fed, ICLR 2022; MedLeak, arXiv 2407.09972",
    limits="goes by the order of the tensors in the file",
)
def front_layers(evidence: Evidence) -> Measured | None:
    """How many dense layers stand before the first convolution, if the last gives as many numbers as the first gets."""
    if not evidence.layers.convolutions:
        return None
    ahead = list(takewhile(lambda layer: layer.dense, evidence.layers.all))
    if len(ahead) < 2 or ahead[-1].weight.shape[0] != ahead[0].weight.shape[1]:
        return Measured(0.0, "", "no dense layers stand in front of the convolutions")
    seen = f"{len(ahead)} dense layers map {ahead[0].weight.shape[1]} numbers to as many before the first convolution"
    return Measured(float(len(ahead)), ahead[0].name, seen)


def _sees_no_images(evidence: Evidence, layer: Weighted) -> bool:
    """Whether the layer is known to see something else than whole images, such as patches, tokens or features."""
    if evidence.watched is None:
        return False
    test = evidence.watched.test
    return any(
        found.layer == layer.name and (found.sees != "image" or found.samples != test.images) for found in test.layers
    )
