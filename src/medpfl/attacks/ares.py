"""ARES: chosen parameters alone turn a model's own layers into random measurements of single images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from medpfl.attacks.activation_inverse import (
    MOST_DENSE,
    Activations,
    activations,
    least_squares,
    random_front,
    sparsest,
)
from medpfl.attacks.base import ATTACKS
from medpfl.attacks.calibration import auxiliary_images, why_no_rounds
from medpfl.attacks.crafted import CraftedAttack, ServerView
from medpfl.attacks.latent_bins import HiddenLayer, binned_latents, hidden_layer, read_latents
from medpfl.attacks.sizes import most_rounds
from medpfl.attacks.updates import gradient_view, nothing_came_back, read_each, why_no_ratios
from medpfl.core.config import STRICT
from medpfl.core.domain import Broadcast, Failure, GlobalModel, Observation, Recipe, Reconstruction, UpdateKind
from medpfl.core.errors import AttackFailure
from medpfl.core.session import NO_SESSION, Session
from medpfl.federation.recipes import has_batch_norm

LATENT = "latent"
"""Name of the secret by which the attack knows its own broadcast."""


@ATTACKS.register(
    "ares",
    summary="chosen parameters in the agreed architecture: random filters, bins on their activations, and the image as "
    "the solution of linear equations",
    paper="ARES, S&P 2026, arXiv 2603.17623 (calibrated scale, least squares and the consistency check are ours)",
    limits="a convolution first, ReLU and no pooling up to a dense layer with ReLU and another dense layer; as many bins "
    "as that layer has units; SGD clients, or one step of Adam; images with few active entries come back incomplete",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class Ares(CraftedAttack):
    """The first convolution gets random filters a_j of norm 1, later ones become identities, and the first dense layer
    sorts images by the mean of their activations as a leakage module does. An image alone in its bin gives its own
    activations z = relu(A x), and every entry above zero is a linear equation for x.

    With fewer equations than pixels, `sparse` takes the image with the least absolute sum of cosine coefficients in
    blocks of 8x8 that fulfills them all; with enough of them, and always with `least_squares`, the solution nearest to
    black. Images are ranked by how well their own activations, those at zero included, agree with what was read.
    """

    solver: Annotated[
        Literal["sparse", "least_squares"], Field(description="what is taken where equations are fewer than pixels")
    ] = "sparse"
    iterations: Annotated[int, Field(ge=1, description="steps of the solver per image")] = 500
    tolerance: Annotated[
        float, Field(gt=0, description="relative error of an image's own activations up to which it is returned")
    ] = 0.1
    scale: Annotated[
        Literal["auto"] | Annotated[float, Field(gt=0)],
        Field(description="size of the dense layer's weights; auto: calibrated on auxiliary images"),
    ] = "auto"
    gain: Annotated[
        Literal["auto"] | Annotated[float, Field(gt=0)],
        Field(description="length of the next layer's columns, times K and scale; auto: calibrated where it matters"),
    ] = "auto"

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "published": {"scale": 1.0},
        "quick": {"solver": "least_squares", "iterations": 200},
    }
    sends: ClassVar[str] = (
        "the agreed architecture with chosen parameters: random filters, copies behind them, and a dense layer that "
        "sorts images by their mean activation"
    )

    def requires(self) -> frozenset[str]:
        """Auxiliary images, for the bins and the scale."""
        return frozenset({"auxiliary"})

    def needs(self) -> frozenset[str]:
        """The tensors only: architecture and all clients' models are as agreed."""
        return frozenset({"parameters"})

    def simulated_steps(self, clients: int) -> int:
        """A step of every client in every trial of every scale."""
        return clients * most_rounds(
            None if self.scale == "auto" else self.scale, None if self.gain == "auto" else self.gain
        )

    def why_not(self, model: GlobalModel, recipe: Recipe | None, update: UpdateKind, examples: int) -> str | None:
        """SGD clients or one step of Adam, and a model whose layers can be made to copy the first convolution's activations."""
        if (reason := why_no_ratios(recipe)) is not None:
            return reason
        if (reason := why_no_rounds(None if self.scale == "auto" else self.scale, recipe)) is not None:
            return reason
        if recipe is not None and recipe.batch_norm == "train" and has_batch_norm(model):
            return "batch norm in train mode mixes the images of a batch, so no layer can be made to copy"
        crafted = _crafted(model, torch.Generator().manual_seed(0))
        return crafted if isinstance(crafted, str) else None

    def prepare(self, server_view: ServerView, generator: torch.Generator) -> Broadcast:
        """The model with chosen parameters. Raises `AttackFailure` without auxiliary images."""
        auxiliary_images(server_view, "ares")
        crafted = _crafted(server_view.model, generator)
        if isinstance(crafted, str):
            raise AttackFailure(crafted)
        model, layer, _ = crafted
        return binned_latents(
            replace(server_view, model=model),
            layer,
            scale=None if self.scale == "auto" else self.scale,
            gain=None if self.gain == "auto" else self.gain,
            secret={LATENT: torch.zeros(())},
            notes=(),
            generator=generator,
        )

    def reconstruct(
        self,
        observations: Sequence[Observation],
        generators: Sequence[torch.Generator],
        session: Session = NO_SESSION,
    ) -> list[Reconstruction | Failure]:
        """Reads every observation on its own; draws nothing."""
        return read_each(observations, session, lambda _, observation: self._read(observation))

    def _read(self, observation: Observation) -> Reconstruction | Failure:
        broadcast = observation.broadcast
        if broadcast is None or LATENT not in broadcast.secret:
            return Failure("ares reads the update of a model that it prepared, and this server sent another")
        layer = hidden_layer(observation.model)
        system = layer if isinstance(layer, str) else activations(observation.model, layer)
        if isinstance(layer, str) or isinstance(system, str):
            return Failure(
                f"the model that was sent is not as it was prepared: {layer if isinstance(layer, str) else system}"
            )
        found = read_latents(observation, layer, float(broadcast.secret["floor"]))
        if not len(found.images):
            return nothing_came_back(observation, f"none of {found.bins_read} bins with a gradient holds activations")
        seen = broadcast.secret["low"] + found.images * broadcast.secret["range"]
        images, few = self._solved(system, seen)
        with torch.no_grad():
            shown = torch.relu(system.before(images))
        errors = ((shown - seen).norm(dim=1) / seen.norm(dim=1)).nan_to_num(nan=float("inf"))
        order = errors.argsort(stable=True)
        order = order[errors[order] <= self.tolerance]
        if not len(order):
            return nothing_came_back(observation, f"no image explains any of {len(seen)} activations that were read")
        error = float(errors[order].mean())
        return Reconstruction(
            images=images[order].clamp(0.0, 1.0),
            labels=None,
            objective=error,
            trace=((0, error),),
            gradient_evaluations=0,
            stop_reason="solved for the images behind the activations",
            unclamped=images[order],
            notes=(
                *broadcast.notes,
                *gradient_view(observation).notes,
                f"{len(seen)} activations were read, {few} with fewer entries above zero than pixels; {len(order)} are "
                "those of an image",
            ),
        )

    def _solved(self, system: Activations, seen: Tensor) -> tuple[Tensor, int]:
        """An image for each of the activations (N, F), and how many of them have fewer equations than pixels."""
        images = least_squares(system, seen, self.iterations)
        few = ((seen > 0).sum(dim=1) < system.pixels).nonzero().flatten().tolist()
        if few and self.solver == "sparse" and system.pixels <= MOST_DENSE:
            matrix, offset = system.matrix()
            for place in few:
                images[place] = sparsest(matrix, offset, seen[place], system.model.image_shape, self.iterations)
        return images, len(few)


def _crafted(model: GlobalModel, generator: torch.Generator) -> tuple[GlobalModel, HiddenLayer, Activations] | str:
    """The model with random filters and copies behind them, its dense layer, and how that sees the filters' outputs."""
    layer = hidden_layer(model)
    if isinstance(layer, str):
        return layer
    crafted = random_front(model, layer, generator)
    if isinstance(crafted, str):
        return crafted
    system = activations(crafted, layer)
    return system if isinstance(system, str) else (crafted, layer, system)
