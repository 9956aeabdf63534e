"""MedLeak: a malicious server puts two dense layers in front of the model and reads images out of the update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from medpfl.attacks.balance import balanced
from medpfl.attacks.base import ATTACKS
from medpfl.attacks.calibration import TRIALS, how_it_went, sought
from medpfl.attacks.crafted import CraftedAttack, ServerView
from medpfl.attacks.front import BIAS, WEIGHT, dense_front_parameters, why_no_memory
from medpfl.attacks.leakage_module import LeakageModule
from medpfl.attacks.module_trials import leaking, played, tried
from medpfl.attacks.module_update import Mode, read_update
from medpfl.attacks.number_grid import HALF
from medpfl.attacks.query_bins import Pattern, Quantiles, QueryBins, fewest_of_best, peelable_shares, query_bins
from medpfl.attacks.several_steps import Steps, candidates, quiet, quiet_sizes, self_stopping
from medpfl.attacks.sizes import GAIN, Sizes, called, most_rounds, sizes
from medpfl.attacks.told import aggregation_note, recipe_note, told_recipe, with_fitted_aggregation
from medpfl.attacks.updates import one_gradient, read_each
from medpfl.core.config import STRICT
from medpfl.core.domain import (
    Broadcast,
    Failure,
    GlobalModel,
    Observation,
    Recipe,
    Reconstruction,
    UpdateKind,
)
from medpfl.core.errors import AttackFailure
from medpfl.core.session import NO_SESSION, Session

MODULE = (WEIGHT, BIAS)
"""What is read out."""

OF_WHICH: dict[Steps, str] = {
    "plain": "the images alone in their bin",
    "first_batch": "all images, of which the first local step's are kept,",
    "all_batches": "all images of all local steps",
}
"""What a calibration's share is of."""


@ATTACKS.register(
    "medleak",
    summary="crafted module of two dense layers in front of any model: closed form read-out of whole batches, "
    "through secure aggregation",
    paper="Shi et al.: MediLeak / MedLeak, arXiv 2407.09972 (module as in Scale-MIA's public code, arXiv 2311.05808; "
    "scale between the layers, calibration, candidate filter, several queries and their peeling are ours)",
    limits="images that share their bins of all queries come back mixed; several local steps blur the read-out",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class MedLeak(CraftedAttack):
    """Unit k of the module is active for images brighter than edge k, and every active unit gets the same error, so
    the gradients of neighboring units differ by the images of one brightness bin: x = (dW_k - dW_k+1) / (db_k - db_k+1)
    exactly if an image is alone in its bin. With equal mass in K bins that is so for a share (1 - 1/K)^(N - 1) of N.

    With several `queries` the units are shared: each query weighs the values of an image in its own way and has quantile
    bins of its own, so that an image that collides in one is alone in another. It is read there and taken out of all
    bins, which frees others (`span_peeling`). `auto` takes as many as let most images be told apart in rounds drawn from
    auxiliary ones, and one where clients take several steps or compute in half precision.

    `separate` sends the module to the victim and a dead one to all others, so that an aggregate shows the victim's
    images; `joint` sends it to all, and the bins tell all clients' images apart, but not whose they are; `apart` divides
    the units among the clients, which tells that too and reads nearly as many: with n images for each of C clients alone
    in their bin are (1 - C/K)^(n - 1), against (1 - 1/K)^(C n - 1). `scale` divides the first layer and
    multiplies the second, which changes no output but lifts the gradient above the rounding of float32 weights and of
    SecAgg+ (1: the published recipe); `auto` takes what recovers most in rounds that the server plays through on
    auxiliary images, with the clients' recipe and the channel's arithmetic. `steps` is about clients that take several
    (`several_steps`). `balance` keeps the errors of all classes alike.
    """

    bins: Annotated[int, Field(ge=2, description="units of the module, K: one brightness bin each")] = 512
    mode: Annotated[
        Mode,
        Field(
            description="separate: the others get a dead module; joint: all clients get the same module; apart: each gets "
            "units of its own, a part of all"
        ),
    ] = "separate"
    scale: Annotated[
        Literal["auto"] | Annotated[float, Field(gt=0)],
        Field(description="size of the first layer's weights; auto: calibrated on auxiliary images"),
    ] = "auto"
    queries: Annotated[
        Literal["auto"] | Annotated[int, Field(ge=1)],
        Field(description="linear queries that share the units; auto: with as many as let most images be told apart"),
    ] = "auto"
    patterns: Annotated[
        Pattern,
        Field(
            description="what queries weigh: the mean value and smooth random patterns; even: in place of the mean what "
            "spreads auxiliary images most evenly; random values, or cosines"
        ),
    ] = "smooth"
    quantiles: Annotated[
        Quantiles,
        Field(description="bins from the distribution of auxiliary brightness, smoothed or as it is, or a normal one"),
    ] = "smoothed"
    gain: Annotated[
        Literal["auto"] | Annotated[float, Field(gt=0)],
        Field(description="length of the second layer's columns, times K and scale; auto: calibrated where it matters"),
    ] = "auto"
    steps: Annotated[
        Steps,
        Field(
            description="where clients take several local steps: first_batch turns the module off after the first, "
            "all_batches keeps it nearly as it is, plain makes it as for one; auto: what recovers more images of the round"
        ),
    ] = "auto"
    balance: Annotated[
        bool, Field(description="shift the last layer's biases so that no class is favored and errors are of one size")
    ] = True

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "published": {
            "scale": 1.0,
            "gain": GAIN,
            "queries": 1,
            "quantiles": "gaussian",
            "balance": False,
            "steps": "plain",
        },
        "quick": {"bins": 256},
    }
    sends: ClassVar[str] = (
        "a crafted model: two dense layers in front of the agreed one, which sort images by brightness so that their "
        "own gradient holds single images"
    )

    def requires(self) -> frozenset[str]:
        """Auxiliary images, for the bins and the scale."""
        return frozenset({"auxiliary"})

    def needs(self) -> frozenset[str]:
        """Another architecture with chosen tensors; for `separate` different ones for different clients."""
        own = {"inconsistent_models"} if self.mode != "joint" else set()
        return frozenset({"parameters", "architecture", *own})

    def uses(self) -> frozenset[str]:
        """The defense's mechanism, which calibration plays through."""
        return frozenset({"defense"})

    def takes(self) -> frozenset[str]:
        """One local step, and an aggregation that fits the module."""
        return frozenset({"recipe", "secure_aggregation"})

    def added_parameters(self, model: GlobalModel, clients: int) -> int:
        """The module's entries."""
        return dense_front_parameters(model, self.bins)

    def simulated_steps(self, clients: int) -> int:
        """A step of every client that gets the module, in every trial of all sizes; for several queries and for one."""
        choices, played = (2, 2 * TRIALS) if self.queries == "auto" else (1, 0)
        return (choices * most_rounds(*self._given()) + played) * (1 if self.mode == "separate" else clients)

    def why_not(self, model: GlobalModel, recipe: Recipe | None, update: UpdateKind, examples: int) -> str | None:
        """The module must fit into memory, and calibration needs the recipe."""
        if self.scale == "auto" and recipe is None:
            return "the recipe is withheld, so no round can be played through: give `scale` a number"
        if self.queries != "auto" and 2 * self.queries > self.bins:
            return f"{self.queries} queries need 2 bins each, and there are {self.bins}: use fewer queries or more bins"
        return why_no_memory(model, self.bins)

    def prepare(self, server_view: ServerView, generator: torch.Generator) -> Broadcast:
        """The module in front of the model. Raises `AttackFailure` without auxiliary images of different brightness."""
        auxiliary = server_view.knowledge.auxiliary
        if auxiliary is None or len(auxiliary.images) < 2:
            raise AttackFailure("medleak needs at least 2 auxiliary images: grant `auxiliary` and leave images for it")
        told = told_recipe(server_view)
        server_view = replace(server_view, recipe=told or server_view.recipe)
        sent = self._chosen(server_view, auxiliary.images, generator)
        return sent if told is None else replace(sent, recipe=told, notes=(*sent.notes, recipe_note(told)))

    def reconstruct(
        self,
        observations: Sequence[Observation],
        generators: Sequence[torch.Generator],
        session: Session = NO_SESSION,
    ) -> list[Reconstruction | Failure]:
        """Reads every observation on its own; draws nothing."""
        return read_each(observations, session, lambda _, observation: read_update(observation, self.mode))

    def _chosen(self, view: ServerView, images: Tensor, generator: torch.Generator) -> Broadcast:
        """The module with as many queries as let most images be read."""
        draw = partial(self._bins, self._units(view), generator=generator)
        if self.queries != "auto":
            return self._made(draw(self.queries, images), view, generator)
        if not _exact(view.recipe):
            return self._made(draw(1, images), view, generator)
        number = view.examples * (view.clients if self.mode == "joint" else 1)
        shares = peelable_shares(draw, self._units(view), images, number, generator)
        count = fewest_of_best(shares)
        sent = self._made(draw(count, images), view, generator)
        if count == 1 or view.recipe is None or (share := played(sent, view, self.mode, generator)) >= shares[1]:
            return sent
        single = self._made(draw(1, images), view, generator)
        return single if played(single, view, self.mode, generator) > share else sent

    def _bins(self, units: int, count: int, images: Tensor, generator: torch.Generator) -> QueryBins:
        return query_bins(self.patterns, count, units, images, generator, self.quantiles)

    def _units(self, view: ServerView) -> int:
        """How many units share the images of a client. Raises `AttackFailure` where clients are too many for all."""
        units = self.bins // view.clients if self.mode == "apart" else self.bins
        if units < 2 * (1 if self.queries == "auto" else self.queries):
            raise AttackFailure(
                f"medleak has too few of its {self.bins} bins for each of {view.clients} clients: use more"
            )
        return units

    def _made(self, bins: QueryBins, view: ServerView, generator: torch.Generator) -> Broadcast:
        """The module with these bins, calibrated if the recipe is known, in the way that suits several steps."""
        if one_gradient(view.recipe):
            return self._module(bins, view, generator)
        ways = candidates(view.recipe, self.steps)
        sent = [self._module(bins, view, generator, way) for way in ways]
        if len(sent) == 1:
            return sent[0]
        shares = [played(one, view, self.mode, generator) for one in sent]
        return sent[shares.index(max(shares))]

    def _module(self, bins: QueryBins, view: ServerView, generator: torch.Generator, way: Steps = "plain") -> Broadcast:
        """The same in one of the ways for several steps; `plain` where clients take only one."""
        auxiliary = view.knowledge.auxiliary
        assert auxiliary is not None  # checked by `prepare`
        direction = torch.randn(auxiliary.images[0].numel(), dtype=torch.float64, generator=generator)
        module = LeakageModule(
            bins=bins.times(view.clients) if self.mode == "apart" else bins,
            direction=(direction / direction.norm()).to(auxiliary.images.device),
            offset=auxiliary.images.double().mean(dim=0).flatten(),
            scale=1.0,
            gain=GAIN if self.gain == "auto" else self.gain,
            half=None if view.recipe is None else HALF.get(view.recipe.precision),
        )
        if way == "all_batches":
            view = replace(view, model=quiet(view.model))
        if self.balance:
            model = balanced(view.model, module.in_front_of, auxiliary.images, view.recipe, auxiliary.targets)
            view = replace(view, model=model)
        if way == "first_batch":
            model, towards = self_stopping(view.model, auxiliary, module.offset)
            view, module = replace(view, model=model), replace(module, direction=towards)
        if view.recipe is None:
            assert self.scale != "auto"  # `why_not` refuses that
            return self._broadcast(replace(module, scale=self.scale), view)
        return self._calibrated(module, view, generator, way)

    def _broadcast(
        self,
        module: LeakageModule,
        view: ServerView,
        way: Steps = "plain",
        floor: float = 0.0,
        notes: tuple[str, ...] = (),
    ) -> Broadcast:
        live = module.in_front_of(view.model)
        models: tuple[GlobalModel, ...]
        models = (live, module.dead(live)) if self.mode == "separate" and view.clients > 1 else (live,)
        bins, blocks = module.bins, view.clients if self.mode == "apart" else 1
        if blocks > 1:
            bins = QueryBins(*(one[: len(one) // blocks] for one in (bins.rows, bins.edges)))
            models = tuple(module.alive_in(one * bins.units, bins.units, view.model) for one in range(blocks))
        secret = {"rows": bins.rows, "edges": bins.edges, "floor": torch.tensor(floor)}
        secret |= {way: torch.tensor(True), "alike": torch.tensor(module.alike)}
        return Broadcast(models, secret, notes)

    def _calibrated(self, module: LeakageModule, view: ServerView, generator: torch.Generator, way: Steps) -> Broadcast:
        """The module with the sizes that recover most in simulated rounds, and what rounding leaves in empty bins."""

        def sized(chosen: Sizes) -> LeakageModule:
            return replace(module, scale=chosen.scale, gain=chosen.gain)

        search = quiet_sizes(*self._given()) if way == "all_batches" else sizes(view.recipe, *self._given())
        chosen, trial = sought(
            view,
            search,
            lambda chosen: with_fitted_aggregation(view, self._broadcast(sized(chosen), view, way), MODULE, generator),
            partial(tried, mode=self.mode),
            leaking=leaking(view, self.mode),
            generator=generator,
        )
        of_which = OF_WHICH[way] if way != "plain" or one_gradient(view.recipe) else "all images of all local steps"
        note = how_it_went(called(search, chosen), len(search.first) > 1, trial, of_which)
        final = self._broadcast(sized(chosen), view, way, trial.floor, (note,))
        final = with_fitted_aggregation(view, final, MODULE, generator)
        return replace(final, notes=(*final.notes, aggregation_note(final))) if final.aggregation else final

    def _given(self) -> tuple[float | None, float | None]:
        return None if self.scale == "auto" else self.scale, None if self.gain == "auto" else self.gain


def _exact(recipe: Recipe | None) -> bool:
    """Whether clients show one gradient, computed in full precision: what peeling needs."""
    return one_gradient(recipe) and (recipe is None or recipe.precision not in HALF)
