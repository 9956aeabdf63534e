"""Peeling: images that are alone in a unit of a dense ReLU layer are read, certified, subtracted, and free others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as config_dataclass
from torch import Tensor

from medpfl.attacks.base import ATTACKS, Attack
from medpfl.attacks.certificates import certify, group, share_of_idle_units
from medpfl.attacks.layers import DenseLayer, first_dense, pixel_map
from medpfl.attacks.updates import gradient_view, nothing_came_back, read_each, why_no_ratios, why_no_scale
from medpfl.core.config import STRICT
from medpfl.core.domain import Failure, GlobalModel, Observation, Recipe, Reconstruction, UpdateKind
from medpfl.core.session import NO_SESSION, Session

FLOOR = {torch.float64: 1e-11, torch.float32: 1e-6}
"""Bias gradients below this share of the largest one are taken for rounding, by the precision of the update."""


PUREST = 10.0
EXACT = 1e-9
"""A round subtracts images whose certificate is within this factor of its best one, or as good as exact."""


@dataclass(frozen=True)
class _Peeled:
    """What has been read: images (K, pixels) with labels and certificate errors, and the gradients that are left."""

    images: Tensor
    labels: Tensor
    errors: Tensor
    weight: Tensor
    bias: Tensor

    def __len__(self) -> int:
        return len(self.images)


@ATTACKS.register(
    "peeling",
    summary="closed form for batches on a dense first layer with ReLU: certified single images, subtracted in turn",
    paper="Shariati, Alambardar Meybodi: Cascading Gradient Inversion via LT-Code Inspired Peeling, 2026, the passive "
    "attack",
    limits="a dense first layer with bias that sees the image, ReLU behind it, one class per image, one gradient or SGD "
    "step; fewer images come back the more alike they are",
)
@config_dataclass(frozen=True, kw_only=True, config=STRICT)
class Peeling(Attack):
    """Of a dense layer with inputs x_i and b images, unit j has dL/dW_j = sum_i d_ji x_i and dL/db_j = sum_i d_ji.

    1. Every unit is read: r_j = dW_j / db_j, an image where one image alone is active in j, else a mixture; units that
    agree are taken together. 2. Certificate: for a candidate x and each class l the model gives d_j(x, l) / b for all
    units. The class whose values equal the observed bias gradients at the candidate's units is its label; a mixture
    fits none. A whole multiple is the same image that many times. Beyond the paper, d(x, l) must lie in the span of
    dW's columns, which few mixtures do even by chance while there are fewer images than units and pixels. 3. Certified images are subtracted from all units
    and the rest is read again, until nothing new is certified.

    All that comes back is certified, so it is exact up to rounding. Images that are active alone nowhere, even after
    the others are gone, do not come back.
    """

    tolerance: Annotated[
        float,
        Field(gt=0, lt=1, description="relative error of the bias gradients up to which a candidate is certified"),
    ] = 1e-3
    agreement: Annotated[
        float, Field(gt=0, description="root mean square pixel difference within which two units show the same image")
    ] = 1e-3

    presets: ClassVar[dict[str, dict[str, Any]]] = {"published": {}, "quick": {}}

    def why_not(self, model: GlobalModel, recipe: Recipe | None, update: UpdateKind, examples: int) -> str | None:
        """A dense first layer on the pixels; for batches units that some images leave idle; one gradient."""
        return why_not_one_dense_gradient(model, recipe, update, examples)

    def reconstruct(
        self,
        observations: Sequence[Observation],
        generators: Sequence[torch.Generator],
        session: Session = NO_SESSION,
    ) -> list[Reconstruction | Failure]:
        """Peels every observation on its own; draws nothing."""
        return read_each(observations, session, lambda _, observation: self._attack(observation))

    def _attack(self, observation: Observation) -> Reconstruction | Failure:
        model = observation.model
        known = (model, observation.recipe, observation.update.kind, observation.examples)
        if (reason := self.why_not(*known)) is not None:
            return Failure(reason)
        layer = first_dense(model)
        assert isinstance(layer, DenseLayer)
        assert layer.bias is not None
        affine = pixel_map(model, layer)
        assert not isinstance(affine, str)
        view = gradient_view(observation)
        if (lost := view.why_lost(layer.weight, layer.bias)) is not None:
            return nothing_came_back(observation, lost)
        weight, bias = view.tensors[layer.weight], view.tensors[layer.bias]
        if not bool(bias.abs().max() > 0):
            return nothing_came_back(observation, f"no unit of '{layer.module}' was active, its bias gradient is zero")
        sent = observation.update.trainable[layer.weight].dtype
        floor = FLOOR.get(sent, FLOOR[torch.float32]) * float(bias.abs().max())
        peeled = self._peel(observation, layer, affine, weight, bias, floor)
        if not len(peeled):
            return nothing_came_back(observation, "no unit shows an image that can be certified")
        order = peeled.errors.argsort(stable=True)
        images = peeled.images[order].reshape(-1, *model.image_shape)
        unexplained = float(peeled.weight.square().sum() / weight.square().sum())
        whole = len(images) == observation.examples
        left = f"{observation.examples - len(images)} of {observation.examples} images are active alone in no unit"
        return Reconstruction(
            images=images.clamp(0.0, 1.0),
            labels=peeled.labels[order],
            objective=unexplained,
            trace=((0, unexplained),),
            gradient_evaluations=0,
            stop_reason="all images certified" if whole else "peeled as far as units show single images",
            unclamped=images,
            notes=view.notes if whole else (*view.notes, left),
        )

    def _peel(
        self,
        observation: Observation,
        layer: DenseLayer,
        affine: tuple[Tensor, Tensor],
        weight: Tensor,
        bias: Tensor,
        floor: float,
    ) -> _Peeled:
        model, examples = observation.model.to(torch.float64), observation.examples
        shift, factor = affine
        found = _Peeled(weight.new_zeros(0, weight.shape[1]), torch.zeros(0).long(), weight.new_zeros(0), weight, bias)
        span = torch.linalg.svd(weight, full_matrices=False).U[:, :examples]
        while len(found) < examples:
            units = torch.nonzero(found.bias.abs() > floor).flatten()
            groups = group(found.weight[units], found.bias[units], shift, factor, self.agreement)
            groups = [one for one in groups if _is_new(one.pixels, found.images, self.agreement)]
            if not groups:
                break
            certified = certify(
                model,
                layer,
                torch.stack([one.pixels for one in groups]),
                [units[one.members] for one in groups],
                found.bias,
                examples,
                span,
                self.tolerance,
            )
            before = len(found)
            best = min((one.error for one in certified), default=0.0)
            for one in sorted(certified, key=lambda certificate: certificate.error):
                room = examples - len(found)
                if (
                    one.error <= max(PUREST * best, EXACT)
                    and one.count <= room
                    and _is_new(one.pixels, found.images, self.agreement)
                ):
                    inputs = shift + factor * one.pixels
                    found = _Peeled(
                        torch.cat([found.images, one.pixels.expand(one.count, -1)]),
                        torch.cat([found.labels, torch.full((one.count,), one.label)]),
                        torch.cat([found.errors, found.errors.new_full((one.count,), one.error)]),
                        found.weight - one.count * one.bias[:, None] * inputs,
                        found.bias - one.count * one.bias,
                    )
            if len(found) == before:
                break
        return found


def why_not_one_dense_gradient(
    model: GlobalModel, recipe: Recipe | None, update: UpdateKind, examples: int
) -> str | None:
    """The reason why images cannot be told apart in the one gradient of a dense first layer; None if they can."""
    layer = first_dense(model)
    if isinstance(layer, str):
        return layer
    if model.task.name != "single_label":
        return "the certificate needs one class per image"
    if (reason := why_no_ratios(recipe) or why_no_scale(recipe, update)) is not None:
        return reason
    if recipe is not None and recipe.update != "gradient" and recipe.local_steps * recipe.epochs > 1:
        return f"the update mixes {recipe.local_steps * recipe.epochs} local steps, the certificate needs one gradient"
    affine = pixel_map(model, layer)
    if isinstance(affine, str):
        return affine
    if examples > 1 and share_of_idle_units(model, layer) == 0.0:
        return f"every unit of '{layer.module}' is active for every image, so none shows a single one; needs ReLU"
    return None


def _is_new(pixels: Tensor, known: Tensor, agreement: float) -> bool:
    """Whether an image differs from all known ones by more than the agreement."""
    return not len(known) or bool(((known - pixels).square().mean(dim=1).sqrt() > agreement).all())
