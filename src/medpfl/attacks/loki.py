"""LOKI: every client gets a convolution of its own, which keeps its images apart from all others' in the aggregate."""

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
from medpfl.attacks.bin_readout import Candidates, read_single_bins
from medpfl.attacks.brightness_bins import alone, bin_counts, brightness, gaussian_edges, smoothed_edges
from medpfl.attacks.calibration import Trial, auxiliary_images, how_it_went, judged, sought, why_no_rounds
from medpfl.attacks.client_blocks import ClientBlocks, block_of, blocks_parameters, ends
from medpfl.attacks.crafted import CraftedAttack, ServerView, why_no_room
from medpfl.attacks.front import WEIGHT
from medpfl.attacks.sizes import GAIN, Sizes, called, most_rounds, sizes
from medpfl.attacks.updates import GradientView, gradient_view, nothing_came_back, read_each, why_no_ratios
from medpfl.core.config import STRICT
from medpfl.core.domain import Batch, Broadcast, Failure, GlobalModel, Observation, Recipe, Reconstruction, UpdateKind
from medpfl.core.errors import AttackFailure
from medpfl.core.session import NO_SESSION, Session
from medpfl.models.shapes import CONVOLUTIONS


@ATTACKS.register(
    "loki",
    summary="crafted convolution with identity kernels for each client in front of brightness bins: reads all clients' "
    "images out of an aggregate and tells whose they are",
    paper="Zhao et al.: LOKI: Large-scale Data Reconstruction Attack against Federated Learning through Model "
    "Manipulation, S&P 2024, arXiv 2303.12233 (constant channel, calibration and candidate filter are ours)",
    limits="images of one client that share a brightness bin come back mixed; SGD clients, or one step of Adam; what is "
    "sent grows with the number of clients; two or three spatial dimensions",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class Loki(CraftedAttack):
    """A convolution copies client z's images into block z of its output and leaves the other blocks empty, so that the
    columns of block z in the next layer's aggregated gradient hold the images of client z alone, however many clients
    there are. The layer's unit k gets a gradient from images of brightness bin k only (hard tanh), so row k is the
    image itself, up to a factor, where one of that client's N images is alone in it: a share (1 - 1/K)^(N - 1).

    Over several local steps a unit that has learned from one image leaves its bin behind, so that the first image of a
    bin is kept and later ones leave no trace: more come back than are alone in their bin.

    The factor is the image's error, and the bias gradient that would show it is shared by all clients. `constant` adds
    a channel to every block that holds 1 for its own client, and so a bias gradient of each client's own: exact. `bin`
    needs no channel and takes the bin's own place for the mean value: off by half a bin's width at most. `stretched`
    is the published demonstration: the row is stretched to [0, 1], and brightness and contrast are lost.
    """

    bins: Annotated[int, Field(ge=2, description="units of the first dense layer, K: one brightness bin each")] = 256
    brightness: Annotated[
        Literal["constant", "bin", "stretched"],
        Field(description="how an image's absolute brightness is found: a constant channel per client, or see above"),
    ] = "constant"
    scale: Annotated[
        Literal["auto"] | Annotated[float, Field(gt=0)],
        Field(description="the convolution's kernels are 1 / scale; auto: calibrated on auxiliary images"),
    ] = "auto"
    quantiles: Annotated[
        Literal["smoothed", "gaussian"],
        Field(description="bins from the smoothed distribution of auxiliary brightness, or from a normal one"),
    ] = "smoothed"
    gain: Annotated[
        Literal["auto"] | Annotated[float, Field(gt=0)],
        Field(description="length of the second dense layer's columns, times K; auto: calibrated where it matters"),
    ] = "auto"
    balance: Annotated[
        bool, Field(description="shift the last layer's biases so that no class is favored and errors are of one size")
    ] = True

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "published": {"brightness": "stretched", "scale": 1 / 500, "quantiles": "gaussian", "balance": False},
        "quick": {"bins": 128},
    }
    sends: ClassVar[str] = (
        "a different crafted model to every client: a convolution whose kernels copy the images of this client alone, "
        "and two dense layers that sort them by brightness, in front of the agreed one"
    )

    def requires(self) -> frozenset[str]:
        """Auxiliary images, for the bins and the scale."""
        return frozenset({"auxiliary"})

    def needs(self) -> frozenset[str]:
        """Another architecture with chosen tensors, different ones for different clients."""
        return frozenset({"parameters", "architecture", "inconsistent_models"})

    def added_parameters(self, model: GlobalModel, clients: int) -> int:
        """Entries of the convolution and the two dense layers."""
        return blocks_parameters(model, self.bins, clients, self.brightness == "constant")

    def simulated_steps(self, clients: int) -> int:
        """One client's step in every trial of every scale: the others' blocks are like it."""
        return most_rounds(*self._given())

    def why_not(self, model: GlobalModel, recipe: Recipe | None, update: UpdateKind, examples: int) -> str | None:
        """Clients must train with SGD, or take one step of Adam, on images that a convolution takes, and calibration needs the recipe."""
        if len(model.image_shape) - 1 not in CONVOLUTIONS:
            return f"the convolution takes images (C, height, width) or volumes, found {tuple(model.image_shape)}"
        if (reason := why_no_ratios(recipe)) is not None:
            return reason
        if (reason := why_no_rounds(None if self.scale == "auto" else self.scale, recipe)) is not None:
            return reason
        return why_no_room(f"a block of {self.bins} units", self.added_parameters(model, clients=1))

    def prepare(self, server_view: ServerView, generator: torch.Generator) -> Broadcast:
        """The front before the model. Raises `AttackFailure` without auxiliary images or memory for all clients."""
        auxiliary, clients = auxiliary_images(server_view, "loki"), server_view.clients
        if reason := why_no_room(
            f"loki's front for {clients} clients", self.added_parameters(server_view.model, clients)
        ):
            raise AttackFailure(reason)
        values = brightness(auxiliary.images)
        direction = torch.randn(auxiliary.images[0].numel(), dtype=torch.float64, generator=generator)
        blocks = ClientBlocks(
            image_shape=tuple(server_view.model.image_shape),
            clients=clients,
            constant=self.brightness == "constant",
            edges=(smoothed_edges if self.quantiles == "smoothed" else gaussian_edges)(values, self.bins),
            direction=(direction / direction.norm()).to(values.device),
            offset=auxiliary.images.double().mean(dim=0).flatten(),
            scale=1.0,
            gain=GAIN if self.gain == "auto" else self.gain,
        )
        levels = _levels(blocks.edges, values)
        if self.balance:
            model = balanced(server_view.model, blocks.in_front_of, auxiliary.images, server_view.recipe)
            server_view = replace(server_view, model=model)

        def sent(chosen: Sizes, floor: float = 0.0, notes: tuple[str, ...] = ()) -> Broadcast:
            sized = replace(blocks, scale=chosen.scale, gain=chosen.gain)
            models = sized.for_clients(server_view.model, clients)
            return Broadcast(models, {"edges": blocks.edges, "levels": levels, "floor": torch.tensor(floor)}, notes)

        if server_view.recipe is None:
            assert self.scale != "auto"  # `why_not` refuses that
            return sent(Sizes(self.scale, blocks.gain))
        search = sizes(server_view.recipe, *self._given())
        chosen, trial = sought(server_view, search, sent, self._tried, leaking=1, names=(WEIGHT,), generator=generator)
        note = how_it_went(
            called(search, chosen), len(search.first) > 1, trial, "the images alone in their client's bin"
        )
        return sent(chosen, trial.floor, (note,))

    def reconstruct(
        self,
        observations: Sequence[Observation],
        generators: Sequence[torch.Generator],
        session: Session = NO_SESSION,
    ) -> list[Reconstruction | Failure]:
        """Reads every observation on its own; draws nothing."""
        return read_each(observations, session, lambda _, observation: self._read(observation))

    def _given(self) -> tuple[float | None, float | None]:
        return None if self.scale == "auto" else self.scale, None if self.gain == "auto" else self.gain

    def _tried(self, batches: Sequence[Batch], observation: Observation) -> Trial:
        """How a simulated round went for its first client, whose images the attacker knows."""
        assert observation.broadcast is not None  # `calibrated` sees to that
        edges, images = observation.broadcast.secret["edges"], batches[0].images
        gradient = _own_columns(observation).tensors[WEIGHT]
        _, strengths = self._rows(observation, gradient, 0)
        empty = strengths[bin_counts(brightness(images), edges) == 0].abs()
        floor = float(empty.max()) if len(empty) else 0.0
        return judged(
            images[alone(brightness(images), edges)], self._candidates(observation, gradient, 0, floor).images, floor
        )

    def _candidates(self, observation: Observation, gradient: Tensor, client: int, floor: float) -> Candidates:
        """What the first dense layer's gradient shows of one client."""
        assert observation.broadcast is not None  # the callers see to that
        rows, strengths = self._rows(observation, gradient, client)
        edges, most = observation.broadcast.secret["edges"], observation.examples // observation.clients
        shape = observation.model.image_shape
        if self.brightness == "stretched":
            return _stretched(rows, shape, most, floor)
        return read_single_bins(rows, strengths, edges, ends(edges), shape, most, floor)

    def _rows(self, observation: Observation, gradient: Tensor, client: int) -> tuple[Tensor, Tensor]:
        """Each bin's images of one client times their errors (K, D), and the errors' sum as far as it is known (K,)."""
        assert observation.broadcast is not None  # the callers see to that
        blocks = len(observation.broadcast.models)
        rows, constant = block_of(gradient, client, blocks, observation.model.image_shape)
        if constant is None:
            constant = rows.mean(dim=1) / observation.broadcast.secret["levels"].to(rows.device)
        return rows, constant

    def _read(self, observation: Observation) -> Reconstruction | Failure:
        if observation.broadcast is None or "levels" not in observation.broadcast.secret:
            return Failure("loki reads the update of a model that it prepared, and this server sent another")
        floor = float(observation.broadcast.secret["floor"])
        view = _own_columns(observation)
        found = [
            self._candidates(observation, view.tensors[WEIGHT], client, floor) for client in observation.taking_part
        ]
        images = torch.cat([one.images for one in found])
        if not len(images):
            return nothing_came_back(observation, "no bin of any client's block with a gradient holds an image")
        deviation = float(torch.cat([one.deviations for one in found]).mean())
        counts = [len(one.images) for one in found]
        return Reconstruction(
            images=images.clamp(0.0, 1.0),
            labels=None,
            objective=deviation,
            trace=((0, deviation),),
            gradient_evaluations=0,
            stop_reason="read out in closed form",
            unclamped=images,
            notes=(
                *observation.broadcast.notes,
                *view.notes,
                f"candidates by client, the victim first: {', '.join(str(count) for count in counts)}",
            ),
            clients=torch.repeat_interleave(torch.tensor(observation.taking_part), torch.tensor(counts)),
        )


def _own_columns(observation: Observation) -> GradientView:
    """The gradient of the first dense layer, of whose columns each has gradients from one client only."""
    return gradient_view(observation, (WEIGHT,), alone=True)


def _levels(edges: Tensor, values: Tensor) -> Tensor:
    """The middle of each bin (K,), as far as there are auxiliary images: the outer bins reach beyond them."""
    low, high = (each.to(values.device).clamp(values.min(), values.max()) for each in (edges, ends(edges)))
    return (low + high) / 2


def _stretched(rows: Tensor, image_shape: tuple[int, ...], most: int, floor: float) -> Candidates:
    """The largest rows, each stretched to [0, 1]: they say nothing of how far they are from an image."""
    strengths = rows.abs().mean(dim=1)
    read = (strengths > floor).nonzero().flatten()
    order = read[strengths[read].argsort(descending=True, stable=True)][:most]
    found = rows[order].abs()
    low, high = found.amin(dim=1, keepdim=True), found.amax(dim=1, keepdim=True)
    images = (found - low) / (high - low).clamp_min(torch.finfo(found.dtype).tiny)
    return Candidates(images.reshape(-1, *image_shape), order, torch.zeros_like(strengths[order]), len(read))
