"""First-layer read-out: a dense first layer gives its input away in closed form, without any search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from medpfl.attacks.base import ATTACKS, Attack
from medpfl.attacks.labels import infer_labels
from medpfl.attacks.layers import DenseLayer, first_dense, pixel_map
from medpfl.attacks.updates import gradient_view, nothing_came_back, read_each, why_no_ratios
from medpfl.core.config import STRICT
from medpfl.core.domain import Failure, GlobalModel, Observation, Recipe, Reconstruction, UpdateKind
from medpfl.core.session import NO_SESSION, Session

UNITS_COMPARED = 4096
"""Units with the largest bias gradients that are compared with each other; more would need too much memory."""


@ATTACKS.register(
    "first_layer_readout",
    summary="closed form dW/db of a dense first layer: exact for one image, single images of a batch per unit",
    paper="Phong et al.: Privacy-Preserving Deep Learning via Additively Homomorphic Encryption, IEEE TIFS 2018, "
    "section III; Geiping et al. 2020, proposition 3.1",
    limits="the first trainable layer must be dense, biased, and see the image itself; SGD or plain gradients",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class FirstLayerReadout(Attack):
    """Unit u of a dense layer with input x has dL/dW_u = (dL/db_u) x for one image, so x = dW_u / db_u.

    One image: all units are combined by least squares, sum(db_u dW_u) / sum(db_u^2), which is exact without noise
    and averages noise away. Several images: a unit that only one of them activates still gives that image; such units
    agree with each other, while mixtures differ from unit to unit and leave [0, 1]. Candidates are ranked by how many
    units agree, then by how little they leave [0, 1], then by the size of the bias gradient.
    """

    agreement: Annotated[
        float, Field(gt=0, description="root mean square pixel difference within which two units show the same image")
    ] = 1e-3
    smallest_bias_gradient: Annotated[
        float, Field(ge=0, description="units below this share of the largest bias gradient are not read")
    ] = 1e-6

    presets: ClassVar[dict[str, dict[str, Any]]] = {"published": {}, "quick": {}}

    def why_not(self, model: GlobalModel, recipe: Recipe | None, update: UpdateKind, examples: int) -> str | None:
        """The first trainable layer must be dense with a bias and see an affine map of the image, pixel by pixel."""
        layer = first_dense(model)
        if isinstance(layer, str):
            return layer
        if (reason := why_no_ratios(recipe)) is not None:
            return reason
        affine = pixel_map(model, layer)
        return affine if isinstance(affine, str) else None

    def reconstruct(
        self,
        observations: Sequence[Observation],
        generators: Sequence[torch.Generator],
        session: Session = NO_SESSION,
    ) -> list[Reconstruction | Failure]:
        """Reads every observation on its own; draws nothing."""
        return read_each(observations, session, lambda _, observation: self._read(observation))

    def _read(self, observation: Observation) -> Reconstruction | Failure:
        model = observation.model
        if (
            reason := self.why_not(model, observation.recipe, observation.update.kind, observation.examples)
        ) is not None:
            return Failure(reason)
        layer = first_dense(model)
        assert isinstance(layer, DenseLayer)
        assert layer.bias is not None
        affine = pixel_map(model, layer)
        assert not isinstance(affine, str)
        shift, factor = affine
        view = gradient_view(observation)
        known = view.known_units(layer.weight, layer.bias)
        if not bool(known.any()):
            return nothing_came_back(observation, view.why_lost(layer.weight, layer.bias) or "no unit is known")
        weight, bias = view.tensors[layer.weight][known], view.tensors[layer.bias][known]
        if not bool(bias.abs().max() > 0):
            return nothing_came_back(observation, f"no unit of '{layer.module}' was active, its bias gradient is zero")
        if observation.examples == 1:
            inputs = (bias @ weight / bias.square().sum())[None]
            notes: tuple[str, ...] = ()
        else:
            inputs, notes = self._singles(weight, bias, shift, factor, observation.examples)
        images = ((inputs - shift) / factor).reshape(-1, *model.image_shape)
        if not bool(torch.isfinite(images).all()):
            return Failure("the ratios of weight and bias gradients are not finite")
        residual = _residual(weight, inputs)
        labels = infer_labels(observation).labels if len(images) == observation.examples == 1 else None
        return Reconstruction(
            images=images.clamp(0.0, 1.0),
            labels=labels,
            objective=residual,
            trace=((0, residual),),
            gradient_evaluations=0,
            stop_reason="read out in closed form",
            unclamped=images,
            notes=(*view.notes, *notes),
        )

    def _singles(
        self, weight: Tensor, bias: Tensor, shift: Tensor, factor: Tensor, examples: int
    ) -> tuple[Tensor, tuple[str, ...]]:
        """At most `examples` inputs (K, inputs) that look like single images, best first."""
        order = bias.abs().argsort(descending=True)[:UNITS_COMPARED]
        order = order[bias[order].abs() >= self.smallest_bias_gradient * bias.abs().max()]
        candidates = weight[order] / bias[order, None]
        pixels = (candidates - shift) / factor
        outside = (pixels - pixels.clamp(0.0, 1.0)).square().mean(dim=1).sqrt()
        near = torch.cdist(pixels, pixels) <= self.agreement * pixels.shape[1] ** 0.5
        taken = torch.zeros(len(order), dtype=torch.bool)
        groups: list[tuple[int, float, float, int]] = []
        for row in range(len(order)):
            if taken[row]:
                continue
            group = near[row] & ~taken
            taken |= group
            groups.append((-int(group.sum()), float(outside[row]), -float(bias[order[row]].abs()), row))
        plausible = [group for group in groups if group[1] <= self.agreement] or groups
        best = [row for *_, row in sorted(plausible)[:examples]]
        alone = sum(-count > 1 for count, *_ in plausible)
        notes = (f"{alone} of {len(groups)} distinct candidates were shown by several units",)
        return candidates[best], notes


def _residual(weight: Tensor, inputs: Tensor) -> float:
    """Share of the weight gradient's squared norm that no combination of the read inputs explains."""
    basis = torch.linalg.qr(inputs.T).Q
    explained = (weight @ basis).square().sum()
    total = weight.square().sum()
    return float(((total - explained) / total.clamp_min(1e-300)).clamp_min(0.0))
