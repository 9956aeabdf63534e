"""SPEAR: a batch's gradient in a dense ReLU layer has few dimensions, and zeros tell which basis is the images'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as config_dataclass
from torch import Tensor

from medpfl.attacks.base import ATTACKS, Attack
from medpfl.attacks.certificates import single_bias_gradients
from medpfl.attacks.layers import DenseLayer, first_dense, pixel_map
from medpfl.attacks.peeling import why_not_one_dense_gradient
from medpfl.attacks.sparse_directions import assemble, sparse_directions
from medpfl.attacks.updates import gradient_view, nothing_came_back, read_each
from medpfl.core.config import STRICT
from medpfl.core.domain import Failure, GlobalModel, Observation, Recipe, Reconstruction, UpdateKind
from medpfl.core.session import NO_SESSION, Session

RANK_FLOOR = {torch.float64: 1e-11, torch.float32: 1e-6}
ZERO = {torch.float64: 1e-7, torch.float32: 1e-4}
"""What counts as rounding in singular values and in entries of a direction, by the precision of the update."""

LABELED = 1e-2
"""Relative error up to which the model's part for a class is an image's."""


@ATTACKS.register(
    "spear",
    summary="closed form for small batches on a dense first layer with ReLU: sparse directions of its weight gradient",
    paper="Dimitrov, Baader, Mueller, Vechev: SPEAR: Exact Gradient Inversion of Batches in Federated Learning, "
    "NeurIPS 2024 (arXiv 2403.03945)",
    limits="a dense first layer with bias that sees the image, ReLU behind it, more units and pixels than images; draws "
    "grow exponentially with the batch (8 to 12 images with the default; about 4 where two dense layers and two to four "
    "classes hide the directions among sparse mixtures), one gradient or SGD step without noise",
)
@config_dataclass(frozen=True, kw_only=True, config=STRICT)
class Spear(Attack):
    """For b images with inputs X and pre-activation gradients D, dL/dW = D X has rank b, and dL/db = D 1.

    1. Thin factors dL/dW = L R. There is one matrix Q with D = L Q and X = Q^-1 R. 2. ReLU makes every column of D
    zero where its image is inactive: draw b - 1 rows of L, take the vector q orthogonal to them, keep it if L q is
    zero in more units than were drawn and the rows where it is zero have rank b - 1 (no mixture). 3. With b directions:
    scale them so that L Q 1 = dL/db, and X = Q^-1 R. 4. Consistency check: the share of (unit, image) pairs whose
    activity under X is that of D; below `consistency` other directions
    are tried and draws go on. The objective is one minus it. Labels are those whose gradient is the image's column.

    All directions are needed: if one is not found, or their images are inconsistent, nothing comes back.
    """

    draws: Annotated[int, Field(ge=1, description="sets of rows that are drawn at most")] = 200_000
    consistency: Annotated[
        float, Field(ge=0, le=1, description="share of (unit, image) pairs whose activity must agree, else draws go on")
    ] = 0.98

    presets: ClassVar[dict[str, dict[str, Any]]] = {"published": {"draws": 2_000_000}, "quick": {"draws": 20_000}}

    def why_not(self, model: GlobalModel, recipe: Recipe | None, update: UpdateKind, examples: int) -> str | None:
        """A dense first layer on the pixels with ReLU, more units than images, one gradient."""
        if (reason := why_not_one_dense_gradient(model, recipe, update, examples)) is not None:
            return reason
        layer = first_dense(model)
        assert isinstance(layer, DenseLayer)
        smaller = min(model.parameters[layer.weight].shape)
        if examples > smaller:
            return f"{examples} images have no own directions in '{layer.module}', which has {smaller} units or inputs"
        return None

    def reconstruct(
        self,
        observations: Sequence[Observation],
        generators: Sequence[torch.Generator],
        session: Session = NO_SESSION,
    ) -> list[Reconstruction | Failure]:
        """Reads every observation on its own; draws rows."""
        return read_each(observations, session, lambda place, observation: self._attack(observation, generators[place]))

    def _attack(self, observation: Observation, generator: torch.Generator) -> Reconstruction | Failure:
        model = observation.model
        known = (model, observation.recipe, observation.update.kind, observation.examples)
        if (reason := self.why_not(*known)) is not None:
            return Failure(reason)
        layer = first_dense(model)
        assert isinstance(layer, DenseLayer)
        assert layer.bias is not None
        view = gradient_view(observation)
        if (lost := view.why_lost(layer.weight, layer.bias)) is not None:
            return nothing_came_back(observation, lost)
        weight, bias = view.tensors[layer.weight], view.tensors[layer.bias]
        if not bool(bias.abs().max() > 0):
            return nothing_came_back(observation, f"no unit of '{layer.module}' was active, its bias gradient is zero")
        sent = observation.update.trainable[layer.weight].dtype
        left, values, turned = torch.linalg.svd(weight, full_matrices=False)
        rank = int((values > RANK_FLOOR.get(sent, RANK_FLOOR[torch.float32]) * values[0]).sum())
        if rank > observation.examples:
            return nothing_came_back(
                observation, f"the weight gradient has rank {rank} for {observation.examples} images, so it was changed"
            )
        left, right = left[:, :rank], values[:rank, None] * turned[:rank]
        affine = pixel_map(model, layer)
        assert not isinstance(affine, str)
        double = model.to(torch.float64)

        def basis(directions: Tensor) -> _Basis | None:
            found = assemble(left, right, directions, bias)
            return None if found is None else _checked(double, layer, affine, found, observation.examples)

        def consistency(directions: Tensor) -> float:
            found = basis(directions)
            return -1.0 if found is None else found.consistency

        zero = ZERO.get(sent, ZERO[torch.float32])
        directions, used = sparse_directions(left, self.draws, zero, generator, consistency, self.consistency)
        if len(directions) < rank:
            return nothing_came_back(observation, f"{used} draws showed {len(directions)} of {rank} directions")
        found = basis(directions)
        if found is None or found.consistency < self.consistency:
            return nothing_came_back(observation, f"the {rank} directions of {used} draws give inconsistent images")
        return _reconstruction(observation, found, (*view.notes, f"{rank} directions in {used} draws"))


@dataclass(frozen=True)
class _Basis:
    """Images (r, pixels), for each the best fitting class and its relative error, the check, and what h leaves open."""

    images: Tensor
    labels: Tensor
    errors: Tensor
    consistency: float
    unexplained: float


def _checked(
    model: GlobalModel,
    layer: DenseLayer,
    affine: tuple[Tensor, Tensor],
    found: tuple[Tensor, Tensor, float],
    examples: int,
) -> _Basis:
    """Runs the images through the model and compares what it does with the columns that they were read from."""
    parts, inputs, unexplained = found
    images = (inputs - affine[0]) / affine[1]
    predicted = single_bias_gradients(model, layer, images) / examples
    active = predicted.abs().amax(dim=1) > 0
    seen = parts.T.abs() > ZERO[torch.float32] * parts.abs().max()
    errors, labels = ((predicted - parts.T[:, None]).norm(dim=2) / parts.T.norm(dim=1)[:, None]).min(dim=1)
    return _Basis(images, labels, errors, float((active == seen).double().mean()), unexplained)


def _reconstruction(observation: Observation, found: _Basis, notes: tuple[str, ...]) -> Reconstruction | Failure:
    images = found.images.reshape(-1, *observation.model.image_shape)
    if not bool(torch.isfinite(images).all()):
        return Failure("the directions give images that are not finite")
    labeled = bool((found.errors <= LABELED).all())
    order = found.errors.argsort(stable=True)
    notes = (
        *notes,
        f"activity agrees in {found.consistency:.4f} of all units, {found.unexplained:.1e} of dL/db is unexplained",
    )
    if not labeled:
        notes = (*notes, "some columns are no class's gradient, as with one image under several classes")
    objective = 1.0 - found.consistency
    return Reconstruction(
        images=images[order].clamp(0.0, 1.0),
        labels=found.labels[order] if labeled else None,
        objective=objective,
        trace=((0, objective),),
        gradient_evaluations=0,
        stop_reason="read out in closed form",
        unclamped=images[order],
        notes=notes,
    )
