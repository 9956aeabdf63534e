"""Curious Abandon Honesty: weights of a first dense layer that make units active for single images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from medpfl.attacks.balance import balanced
from medpfl.attacks.base import ATTACKS, Attack
from medpfl.attacks.calibration import (
    Trial,
    auxiliary_images,
    calibrated,
    how_it_went,
    judged,
    rounds_played,
    why_no_rounds,
)
from medpfl.attacks.certificates import share_of_idle_units
from medpfl.attacks.crafted import CraftedAttack, ServerView
from medpfl.attacks.first_layer_readout import FirstLayerReadout
from medpfl.attacks.front import (
    BIAS,
    SECOND_BIAS,
    SECOND_WEIGHT,
    WEIGHT,
    dense_front_parameters,
    dense_in_front,
    why_no_memory,
)
from medpfl.attacks.layers import DenseLayer, first_dense, pixel_map
from medpfl.attacks.peeling import Peeling
from medpfl.attacks.trap_weights import (
    Signs,
    Traps,
    drawn_traps,
    inputs_of,
    readable,
    with_factor,
    with_thresholds,
)
from medpfl.attacks.updates import why_no_readout, why_no_scale
from medpfl.core.config import STRICT
from medpfl.core.domain import Batch, Broadcast, Failure, GlobalModel, Observation, Recipe, Reconstruction, UpdateKind
from medpfl.core.errors import AttackFailure
from medpfl.core.session import NO_SESSION, Session


@ATTACKS.register(
    "curious_abandon_honesty",
    summary="trap weights: a first dense layer whose units are active for about one image each, in front of any model or "
    "the model's own",
    paper="Boenisch, Dziedzic, Schuster, Shamsabadi, Shumailov, Papernot: When the Curious Abandon Honesty, EuroS&P 2023 "
    "(arXiv 2112.02918); independent signs, thresholds from auxiliary images, scale and certificate are additions",
    limits="images come back that are the only ones in some unit: no more than the batch's convex hull has corners, few "
    "where images are alike; SGD clients with one local step",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class CuriousAbandonHonesty(CraftedAttack):
    """Rows of random signs whose positive weights are a little smaller than the negative ones are active for few images.
    Where one image alone is active in unit k, dW_k / db_k is that image.

    `front` puts two dense layers before the model, whose output is added to the image; `own` sets the weights of the
    model's own first layer, where that is dense with ReLU behind it, and changes no architecture. `tuning` makes the mean
    unit active for `active` of all images that the update is of: by the positive weights' `factor`, as the authors
    do, or by a threshold for each unit, which also serves images of nearly equal brightness. The second layer's
    columns are random, so that mixtures differ from unit to unit and single images do not.

    `read: units` takes what most units agree on; `peeling` certifies images by their class and subtracts them, which
    frees others. `scale` is the deviation of the weights; `auto` calibrates it on auxiliary images.
    """

    place: Annotated[
        Literal["front", "own"],
        Field(description="a layer of its own in front of the model, or the model's first layer where that is dense"),
    ] = "front"
    units: Annotated[
        int, Field(ge=2, description="units of the layer in front; the model's own has its own number")
    ] = 1000
    signs: Annotated[
        Signs, Field(description="of the weights: drawn one by one, or half of a row repeats the other half's sizes")
    ] = "independent"
    tuning: Annotated[
        Literal["factor", "thresholds"],
        Field(description="what is fitted to auxiliary images: the positive weights' factor, or a bias for every unit"),
    ] = "thresholds"
    factor: Annotated[
        Literal["auto"] | Annotated[float, Field(gt=0)],
        Field(description="size of positive weights against negative ones; auto: fitted, 1 with thresholds"),
    ] = "auto"
    active: Annotated[float, Field(gt=0, description="images of an update that the mean unit is to be active for")] = (
        1.0
    )
    scale: Annotated[
        Literal["auto"] | Annotated[float, Field(gt=0)],
        Field(description="deviation of the weights; auto: calibrated on auxiliary images"),
    ] = "auto"
    gain: Annotated[float, Field(gt=0, description="length of the second layer's columns, times scale (front)")] = 1.0
    read: Annotated[
        Literal["units", "peeling"],
        Field(description="images that units agree on; or certified ones, subtracted in turn (one class per image)"),
    ] = "units"
    balance: Annotated[
        bool, Field(description="shift the last layer's biases so that no class is favored and errors are of one size")
    ] = True

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "published": {
            "place": "own",
            "signs": "mirrored",
            "tuning": "factor",
            "factor": 0.95,
            "scale": 0.5,
            "balance": False,
        },
        "quick": {"units": 500},
    }
    sends: ClassVar[str] = (
        "a crafted model: a first dense layer with trap weights, whose units are active for about one image each, so "
        "that their own gradients hold single images"
    )

    def requires(self) -> frozenset[str]:
        """Auxiliary images, where anything is fitted to them."""
        fitted = self.scale == "auto" or self.tuning == "thresholds" or self.factor == "auto" or self.balance
        return frozenset({"auxiliary"}) if fitted else frozenset()

    def needs(self) -> frozenset[str]:
        """Chosen tensors, and for `front` another architecture."""
        return frozenset({"parameters"} if self.place == "own" else {"parameters", "architecture"})

    def added_parameters(self, model: GlobalModel, clients: int) -> int:
        """Entries of the layers in front."""
        return 0 if self.place == "own" else dense_front_parameters(model, self.units)

    def simulated_steps(self, clients: int) -> int:
        """A step of every client in every round that is played through."""
        return rounds_played(self._scale) * clients if "auxiliary" in self.requires() else 0

    def why_not(self, model: GlobalModel, recipe: Recipe | None, update: UpdateKind, examples: int) -> str | None:
        """Clients must train with SGD; `own` needs a dense first layer with ReLU; peeling one class per image."""
        if (reason := why_no_readout(recipe)) is not None:
            return reason
        if (reason := why_no_rounds(self._scale, recipe)) is not None:
            return reason
        if self.read == "peeling":
            if model.task.name != "single_label":
                return "the certificate of `read: peeling` needs one class per image: set read: units"
            if (reason := why_no_scale(recipe, update)) is not None:
                return reason
        return why_no_memory(model, self.units) if self.place == "front" else _why_no_own_layer(model)

    def prepare(self, server_view: ServerView, generator: torch.Generator) -> Broadcast:
        """The layer's weights. Raises `AttackFailure` without the auxiliary images that it is fitted to."""
        auxiliary = server_view.knowledge.auxiliary
        if self.requires():
            auxiliary = auxiliary_images(server_view, "curious_abandon_honesty")
        if self.requires() and (auxiliary is None or len(auxiliary.images) < 2):
            raise AttackFailure(
                "curious_abandon_honesty needs at least 2 auxiliary images: grant `auxiliary` and leave images for it"
            )
        view, traps = server_view, self._traps(server_view, generator)
        inputs = torch.Size(view.model.image_shape).numel()
        columns = torch.zeros(0, dtype=torch.float64)
        if self.place == "front":
            columns = torch.randn(inputs, len(traps.bias), dtype=torch.float64, generator=generator) / inputs**0.5

        def placed(scale: float, model: GlobalModel) -> GlobalModel:
            weight, bias = (tensor.to(model.device) for tensor in traps.tensors(scale))
            if self.place == "front":
                second = (self.gain / scale * columns).float().to(model.device)
                tensors = {WEIGHT: weight, BIAS: bias, SECOND_WEIGHT: second, SECOND_BIAS: second.new_zeros(inputs)}
                return dense_in_front(model, tensors, residual=True)
            layer = _dense(model)
            assert layer.bias is not None  # `first_dense` sees to that
            return replace(model, parameters={**model.parameters, layer.weight: weight, layer.bias: bias})

        if self.balance and auxiliary is not None:
            first = self._scale or 1.0
            model = balanced(view.model, lambda model: placed(first, model), auxiliary.images, view.recipe)
            view = replace(view, model=model)

        def sent(scale: float, notes: tuple[str, ...] = ()) -> Broadcast:
            return Broadcast((placed(scale, view.model),), {"factor": torch.tensor(traps.factor)}, notes)

        if self._scale is not None and (auxiliary is None or view.recipe is None):
            return sent(self._scale)
        layer = _dense(sent(1.0).model(0))
        assert layer.bias is not None
        scale, trial = calibrated(
            view,
            self._scale,
            sent,
            _tried,
            leaking=view.clients,
            names=(layer.weight, layer.bias),
            generator=generator,
        )
        note = how_it_went(f"scale {scale:g}", self.scale == "auto", trial, "the images that are alone in some unit")
        return sent(scale, (note,))

    def reconstruct(
        self,
        observations: Sequence[Observation],
        generators: Sequence[torch.Generator],
        session: Session = NO_SESSION,
    ) -> list[Reconstruction | Failure]:
        """Reads what it prepared as a dense first layer is read; draws nothing."""
        own = [one.broadcast is not None and "factor" in one.broadcast.secret for one in observations]
        if not all(own):
            other = "curious_abandon_honesty reads the update of a model that it prepared, and this server sent another"
            return [Failure(other)] * len(observations)
        reader: Attack = Peeling() if self.read == "peeling" else FirstLayerReadout()
        return [
            replace(result, notes=(*observation.broadcast.notes, *result.notes))
            if isinstance(result, Reconstruction) and observation.broadcast is not None
            else result
            for observation, result in zip(
                observations, reader.reconstruct(observations, generators, session), strict=True
            )
        ]

    @property
    def _scale(self) -> float | None:
        return None if self.scale == "auto" else self.scale

    def _traps(self, view: ServerView, generator: torch.Generator) -> Traps:
        model, auxiliary = view.model, view.knowledge.auxiliary
        factor = self.factor if self.factor != "auto" else 1.0
        if self.place == "front":
            units, inputs = self.units, torch.Size(model.image_shape).numel()
        else:
            units, inputs = (int(size) for size in model.parameters[_dense(model).weight].shape)
        traps = drawn_traps(units, inputs, factor, self.signs, generator)
        if auxiliary is None:
            return traps
        images = auxiliary.images
        seen = images.flatten(1) if self.place == "front" else inputs_of(model, _dense(model), images)
        share = min(self.active / (view.examples * view.clients), 0.5)
        if self.tuning == "thresholds":
            return with_thresholds(traps, seen.cpu(), share)
        return traps if self.factor != "auto" else with_factor(traps, seen.cpu(), share)


def _tried(batches: Sequence[Batch], observation: Observation) -> Trial:
    """How a simulated round went, whose images the attacker knows."""
    images, model = torch.cat([batch.images for batch in batches]), observation.model
    layer = _dense(model)
    assert layer.bias is not None
    inputs = inputs_of(model, layer, images).double()
    active = inputs @ model.parameters[layer.weight].double().T + model.parameters[layer.bias].double() > 0
    (found,) = FirstLayerReadout().reconstruct([observation], [torch.Generator()])
    shown = found.images if isinstance(found, Reconstruction) else images[:0]
    return judged(images[readable(active)].cpu(), shown, 0.0)


def _dense(model: GlobalModel) -> DenseLayer:
    layer = first_dense(model)
    assert not isinstance(layer, str), layer  # `why_not` refuses that
    return layer


def _why_no_own_layer(model: GlobalModel) -> str | None:
    layer = first_dense(model)
    if isinstance(layer, str):
        return f"{layer}: set place: front, where the server may change the architecture"
    affine = pixel_map(model, layer)
    if isinstance(affine, str):
        return affine
    if share_of_idle_units(model, layer) == 0.0:
        return f"every unit of '{layer.module}' is active for every image, so none shows a single one; needs ReLU"
    return None
