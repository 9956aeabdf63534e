"""Scale-MIA: bins on a model's latents give single latents, and a decoder of the server's turns them into images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from medpfl.attacks.base import ATTACKS
from medpfl.attacks.calibration import why_no_rounds
from medpfl.attacks.crafted import CraftedAttack, ServerView
from medpfl.attacks.latent_bins import HiddenLayer, binned_latents, hidden_layer, latents, read_latents
from medpfl.attacks.latent_decoder import DECODER, decoded, trained_decoder
from medpfl.attacks.sizes import most_rounds
from medpfl.attacks.updates import gradient_view, nothing_came_back, read_each, why_no_ratios
from medpfl.core.config import STRICT
from medpfl.core.domain import Broadcast, Failure, GlobalModel, Observation, Recipe, Reconstruction, UpdateKind
from medpfl.core.errors import AttackFailure
from medpfl.core.functional import MSE_FLOOR
from medpfl.core.session import NO_SESSION, Session
from medpfl.models.shapes import CONVOLUTIONS

FEWEST = 20
"""Auxiliary images below which no decoder can be trained."""

STEP_OF_DECODER = 4
"""Client steps that take as long as one of the decoder, whose batches are larger (3 to 5 with 16 images on one core)."""


@ATTACKS.register(
    "scale_mia",
    summary="chosen parameters in the agreed architecture: bins on the latents behind the convolutions, and a decoder "
    "trained on auxiliary images that turns each latent into an image",
    paper="Shi et al.: Scale-MIA, NDSS 2025, arXiv 2311.05808 (calibrated scale and smoothed bins are ours)",
    limits="a dense layer with ReLU and another dense layer behind the convolutions; as many bins as that layer has "
    "units; SGD clients, or one step of Adam; no image is clearer than the decoder makes its latents",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class ScaleMia(CraftedAttack):
    """1. The server trains the model's own convolutions and a decoder as an autoencoder on auxiliary images. 2. The first
    dense layer sorts images by the mean of their latents z, as a leakage module does by brightness: of an image alone
    in its bin the update gives z itself, of one among N in K bins so with chance (1 - 1/K)^(N - 1). 3. The decoder
    turns z into the image. Its own error, decoder(encoder(x)), is the ceiling of what can come back.

    With `encoder: as_sent` the convolutions stay as they were agreed and only the decoder is trained.
    """

    steps: Annotated[int, Field(ge=1, description="Adam steps of the autoencoder, on batches of 50")] = 1000
    width: Annotated[int, Field(ge=1, description="channels of the decoder's convolutions")] = 32
    encoder: Annotated[
        Literal["trained", "as_sent"],
        Field(description="trained: the server chooses the convolutions too; as_sent: they stay as agreed"),
    ] = "trained"
    scale: Annotated[
        Literal["auto"] | Annotated[float, Field(gt=0)],
        Field(description="size of the dense layer's weights; auto: calibrated on auxiliary images"),
    ] = "auto"
    gain: Annotated[
        Literal["auto"] | Annotated[float, Field(gt=0)],
        Field(description="length of the next layer's columns, times K and scale; auto: calibrated where it matters"),
    ] = "auto"

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "published": {"scale": 1.0, "steps": 35_000},
        "quick": {"steps": 300},
    }
    sends: ClassVar[str] = (
        "the agreed architecture with chosen parameters: convolutions whose outputs a decoder of the server turns back "
        "into images, and a dense layer that sorts images by the mean of these outputs"
    )

    def requires(self) -> frozenset[str]:
        """Auxiliary images, for the decoder, the bins and the scale."""
        return frozenset({"auxiliary"})

    def needs(self) -> frozenset[str]:
        """The tensors only: architecture and all clients' models are as agreed."""
        return frozenset({"parameters"})

    def simulated_steps(self, clients: int) -> int:
        """Those of the decoder, each of which takes as long as several, and a client's in every trial of every scale."""
        return STEP_OF_DECODER * self.steps + clients * most_rounds(
            None if self.scale == "auto" else self.scale, None if self.gain == "auto" else self.gain
        )

    def why_not(self, model: GlobalModel, recipe: Recipe | None, update: UpdateKind, examples: int) -> str | None:
        """SGD clients or one step of Adam, and a model with a hidden dense layer."""
        if len(model.image_shape) - 1 not in CONVOLUTIONS:
            return f"the decoder makes images (C, height, width) or volumes, found {tuple(model.image_shape)}"
        if (reason := why_no_ratios(recipe)) is not None:
            return reason
        if (reason := why_no_rounds(None if self.scale == "auto" else self.scale, recipe)) is not None:
            return reason
        layer = hidden_layer(model)
        return layer if isinstance(layer, str) else None

    def prepare(self, server_view: ServerView, generator: torch.Generator) -> Broadcast:
        """Trains the decoder, then sets the bins. Raises `AttackFailure` without enough auxiliary images."""
        auxiliary, layer = server_view.knowledge.auxiliary, hidden_layer(server_view.model)
        if auxiliary is None or len(auxiliary.images) < FEWEST:
            raise AttackFailure(
                f"scale_mia needs at least {FEWEST} auxiliary images to train a decoder: grant `auxiliary` and leave "
                "images for it"
            )
        if isinstance(layer, str):
            raise AttackFailure(layer)
        model, decoder, error = trained_decoder(
            server_view.model,
            layer,
            auxiliary.images,
            steps=self.steps,
            width=self.width,
            train_encoder=self.encoder == "trained",
            generator=generator,
            session=server_view.session,
        )
        level = -10.0 * torch.tensor(max(error, MSE_FLOOR)).log10()
        return binned_latents(
            replace(server_view, model=model),
            layer,
            scale=None if self.scale == "auto" else self.scale,
            gain=None if self.gain == "auto" else self.gain,
            secret=decoder,
            notes=(f"the decoder's own error on auxiliary images that it was not trained on is {float(level):.1f} dB",),
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
        layer = hidden_layer(observation.model)
        if (
            broadcast is None
            or isinstance(layer, str)
            or not any(name.startswith(DECODER) for name in broadcast.secret)
        ):
            return Failure("scale_mia reads the update of a model that it prepared, and this server sent another")
        found = read_latents(observation, layer, float(broadcast.secret["floor"]))
        if not len(found.images):
            return nothing_came_back(observation, f"none of {found.bins_read} bins with a gradient holds a latent")
        seen = broadcast.secret["low"] + found.images * broadcast.secret["range"]
        images = decoded(observation.model, layer, broadcast.secret, seen)
        deviation = float(found.deviations.mean())
        return Reconstruction(
            images=images.clamp(0.0, 1.0),
            labels=None,
            objective=deviation,
            trace=((0, deviation),),
            gradient_evaluations=0,
            stop_reason="latents read out in closed form and decoded",
            unclamped=images,
            notes=(
                *broadcast.notes,
                *gradient_view(observation).notes,
                f"{len(images)} latents out of {found.bins_read} bins with a gradient",
            ),
        )


def ceiling(broadcast: Broadcast, images: Tensor) -> Tensor:
    """decoder(encoder(x)) of images (N, C, *spatial): what comes back of each at best."""
    model = broadcast.model(0)
    layer = hidden_layer(model)
    assert isinstance(layer, HiddenLayer)  # the broadcast is the attack's own
    return decoded(model, layer, broadcast.secret, latents(model, layer, images))
