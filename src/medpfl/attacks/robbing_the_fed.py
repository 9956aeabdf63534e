"""Robbing the Fed: an imprint block in front of the model, the same for all clients, divides images by a linear query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from medpfl.attacks.balance import balanced
from medpfl.attacks.base import ATTACKS
from medpfl.attacks.bin_readout import read_out
from medpfl.attacks.brightness_bins import alone, bin_counts, smoothed_edges
from medpfl.attacks.calibration import (
    Trial,
    auxiliary_images,
    calibrated,
    how_it_went,
    judged,
    rounds_played,
    why_no_rounds,
)
from medpfl.attacks.crafted import CraftedAttack, ServerView
from medpfl.attacks.front import BIAS, WEIGHT, dense_front_parameters, why_no_memory
from medpfl.attacks.imprint import Imprint, bin_gradients, fitted_edges, floor_of, read_imprint
from medpfl.attacks.linear_queries import QueryName, below_all, linear_query, query_values
from medpfl.attacks.updates import GradientView, gradient_view, read_each, why_no_readout
from medpfl.core.config import STRICT
from medpfl.core.domain import Batch, Broadcast, Failure, GlobalModel, Observation, Recipe, Reconstruction, UpdateKind
from medpfl.core.session import NO_SESSION, Session


@ATTACKS.register(
    "robbing_the_fed",
    summary="imprint block in front of any model: bins of a linear query, the same model for all clients",
    paper="Fowl, Geiping, Czaja, Goldblum, Goldstein: Robbing the Fed - Directly Obtaining Private Data in Federated "
    "Learning with Modified Models, ICLR 2022 (arXiv 2110.13057); scale, calibration and candidate filter are ours",
    limits="images that share a bin come back mixed; behind an aggregate all clients' images share the bins; SGD "
    "clients; several local steps blur the read-out",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class RobbingTheFed(CraftedAttack):
    """`cumulative`: unit k is active for images whose query lies above edge k, and neighbors differ by one bin's images,
    so x = (dW_k - dW_k+1) / (db_k - db_k+1). `sparse`: unit k has a slope inside bin k only, so x = dW_k / db_k without
    a difference. Either gives an image exactly if it is alone in its bin, which with equal mass in K bins holds for a
    share (1 - 1/K)^(N - 1) of N images.

    All clients get the same block, so that an aggregate's images share the bins. `residual` adds the image to the
    block's output, so that the model still sees it and can be trained.

    The first edge is below and the last one above all images, every bin is as wide as its own slope says, and all are
    read. `scale` (the paper's gain) lifts the gradient above rounding without a change of the output; `auto`
    calibrates it on auxiliary images as MedLeak does. `gain: null` and `quantiles: fitted` are the published columns of ones
    and normal (for cosines Laplace) quantiles.
    """

    bins: Annotated[int, Field(ge=2, description="units of the block, K: one bin each")] = 512
    variant: Annotated[
        Literal["cumulative", "sparse"],
        Field(description="units active above their edge, read by differences; or inside their bin, read directly"),
    ] = "cumulative"
    query: Annotated[
        QueryName, Field(description="what the bins divide: mean value, a cosine, or random weights of the pixels")
    ] = "mean"
    connection: Annotated[
        Literal["linear", "residual"],
        Field(description="linear: the model sees the block's output only; residual: the image plus it"),
    ] = "linear"
    quantiles: Annotated[
        Literal["smoothed", "fitted"],
        Field(description="bins from the smoothed distribution of auxiliary values, or from the published families"),
    ] = "smoothed"
    scale: Annotated[
        Literal["auto"] | Annotated[float, Field(gt=0)],
        Field(description="factor of the first layer, divided out in the second; auto: calibrated on auxiliary images"),
    ] = "auto"
    gain: Annotated[
        float | None,
        Field(gt=0, description="length of the second layer's columns, times K and scale; null: columns of 1 / scale"),
    ] = 10.0
    balance: Annotated[
        bool, Field(description="shift the last layer's biases so that no class is favored and errors are of one size")
    ] = True

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "published": {"scale": 1.0, "quantiles": "fitted", "gain": None, "balance": False},
        "quick": {"bins": 256},
    }
    sends: ClassVar[str] = (
        "a crafted model: an imprint block of two dense layers in front of the agreed one, which sorts images by a "
        "linear query so that its own gradient holds single images"
    )

    def requires(self) -> frozenset[str]:
        """Auxiliary images, for the bins and the scale."""
        return frozenset({"auxiliary"})

    def needs(self) -> frozenset[str]:
        """Another architecture with chosen tensors, the same for all clients."""
        return frozenset({"parameters", "architecture"})

    def added_parameters(self, model: GlobalModel, clients: int) -> int:
        """The block's entries."""
        return dense_front_parameters(model, self.bins)

    def simulated_steps(self, clients: int) -> int:
        """A step of every client in every round that is played through."""
        return rounds_played(self._scale) * clients

    def why_not(self, model: GlobalModel, recipe: Recipe | None, update: UpdateKind, examples: int) -> str | None:
        """Clients must train with SGD, the block must fit into memory, and calibration needs the recipe."""
        if (reason := why_no_readout(recipe)) is not None:
            return reason
        if (reason := why_no_rounds(self._scale, recipe)) is not None:
            return reason
        return why_no_memory(model, self.bins)

    def prepare(self, server_view: ServerView, generator: torch.Generator) -> Broadcast:
        """The block in front of the model. Raises `AttackFailure` without auxiliary images."""
        auxiliary = auxiliary_images(server_view, "robbing_the_fed")
        images = auxiliary.images
        query = linear_query(self.query, server_view.model.image_shape, generator)
        edges = self._edges(query_values(images, query), query)
        inputs = len(query)
        if self.gain is None:
            column, offset = torch.ones(inputs, dtype=torch.float64), -edges[1:-1].mean().expand(inputs)
        else:
            direction = torch.randn(inputs, dtype=torch.float64, generator=generator)
            column = self.gain / self.bins * direction / direction.norm()
            offset = (
                torch.zeros(inputs) if self.connection == "residual" else images.double().mean(dim=0).flatten().cpu()
            )
        block = Imprint(
            edges=edges,
            query=query,
            column=column,
            offset=offset,
            scale=1.0,
            sparse=self.variant == "sparse",
            residual=self.connection == "residual",
        )
        if self.balance:
            model = balanced(server_view.model, block.in_front_of, images, server_view.recipe, auxiliary.targets)
            server_view = replace(server_view, model=model)
        if server_view.recipe is None:
            assert self._scale is not None  # `why_not` refuses that
            return _broadcast(replace(block, scale=self._scale), server_view)
        scale, trial = calibrated(
            server_view,
            self._scale,
            lambda scale: _broadcast(replace(block, scale=scale), server_view),
            self._tried,
            leaking=server_view.clients,
            generator=generator,
        )
        note = how_it_went(f"scale {scale:g}", self.scale == "auto", trial, "the images alone in their bin")
        return _broadcast(replace(block, scale=scale), server_view, trial.floor, (note,))

    def reconstruct(
        self,
        observations: Sequence[Observation],
        generators: Sequence[torch.Generator],
        session: Session = NO_SESSION,
    ) -> list[Reconstruction | Failure]:
        """Reads every observation on its own; draws nothing."""
        return read_each(observations, session, lambda _, observation: self._read(observation))

    @property
    def _scale(self) -> float | None:
        return None if self.scale == "auto" else self.scale

    def _edges(self, values: Tensor, query: Tensor) -> Tensor:
        """(K + 1,): bins of equal mass, the first from below and the last to above all images."""
        lowest, highest = below_all(query), -below_all(-query)
        if self.quantiles == "smoothed":
            edges = smoothed_edges(values, self.bins, lowest)
            return torch.cat([edges, edges.new_tensor([highest])])
        levels = torch.arange(1, self.bins, dtype=torch.float64) / self.bins
        inner = fitted_edges(values, levels, self.query).clamp(lowest, highest)
        return torch.cat([inner.new_tensor([lowest]), inner, inner.new_tensor([highest])])

    def _tried(self, batches: Sequence[Batch], observation: Observation) -> Trial:
        """How a simulated round went, whose images the attacker knows."""
        assert observation.broadcast is not None  # `calibrated` sees to that
        secret, images = observation.broadcast.secret, torch.cat([batch.images for batch in batches])
        values, edges = query_values(images, secret["query"]), secret["edges"][:-1]
        gradient = _block_gradient(observation).tensors
        _, steps = bin_gradients(gradient, self.variant == "sparse")
        floor = floor_of(steps.cpu(), bin_counts(values, edges))
        found = read_imprint(gradient, secret, *self._form(observation), floor)
        return judged(images[alone(values, edges).to(images.device)], found.images, floor)

    def _form(self, observation: Observation) -> tuple[bool, tuple[int, ...], int]:
        return self.variant == "sparse", observation.model.image_shape, observation.examples

    def _read(self, observation: Observation) -> Reconstruction | Failure:
        broadcast = observation.broadcast
        if broadcast is None or "query" not in broadcast.secret:
            return Failure("robbing_the_fed reads the update of a model that it prepared, and this server sent another")
        view, floor = _block_gradient(observation), float(broadcast.secret["floor"])
        found = read_imprint(view.tensors, broadcast.secret, *self._form(observation), floor)
        return read_out(observation, found, view.notes)


def _block_gradient(observation: Observation) -> GradientView:
    return gradient_view(observation, (WEIGHT, BIAS), alone=observation.clients == 1)


def _broadcast(block: Imprint, view: ServerView, floor: float = 0.0, notes: tuple[str, ...] = ()) -> Broadcast:
    secret = {"edges": block.edges, "query": block.query, "floor": torch.tensor(floor)}
    return Broadcast((block.in_front_of(view.model),), secret, notes)
