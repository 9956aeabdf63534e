"""How an attacker chooses a crafted model's numbers: it plays the round through on images that it owns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

import torch
from torch import Tensor

from medpfl.attacks.crafted import ServerView
from medpfl.attacks.first_step import idle_change
from medpfl.attacks.front import BIAS, WEIGHT
from medpfl.attacks.known_defense import known_defense
from medpfl.core.domain import Auxiliary, Batch, Broadcast, ClientState, GlobalModel, Observation, Recipe, Update
from medpfl.core.errors import AttackFailure
from medpfl.core.functional import MSE_FLOOR
from medpfl.federation.client import client_step

S = TypeVar("S")

RECOVERED = 1e-3
"""Mean squared error of 30 dB."""

AS_GOOD = 0.01
"""Shares of recovered images that differ by no more count as equal, and the clearer images decide."""

CLEAR = 60.0
"""Images that are clearer than so many dB count as equally clear, so that no value at the edge of failing is chosen."""


SCALES = tuple(10.0**-power for power in range(13))
"""What a scale is sought among first."""

FINER = 10**0.5
"""Factor to both sides of the best of them that is tried then."""

ROUNDING_MARGIN = 10.0
"""So far below what full bins show is what empty bins show if no image is in a wrong bin."""

ANOTHER_ROUND = 2.0
"""By how much the largest rounding of another round may exceed that of those played through."""

TRIALS = 2
"""Simulated rounds per scale."""


@dataclass(frozen=True)
class Trial:
    """What simulated rounds gave back of the images that can be read: their share above 30 dB, and mean PSNR (dB).

    floor: the largest of what rounding left where nothing was.
    """

    share: float
    psnr: float
    floor: float


FAILED = Trial(0.0, 0.0, 0.0)
"""How a round went of whose update nothing can be read."""


@dataclass(frozen=True)
class Search(Generic[S]):
    """Settings that are tried, and those that are tried then around the best of them, itself among them; none for no more.

    Of settings that are as good the first is taken.
    """

    first: Sequence[S]
    then: Callable[[S], Sequence[S]] = lambda _: ()

    @property
    def rounds(self) -> int:
        """How many rounds it takes to simulate them all."""
        then = self.then(self.first[0])
        return TRIALS * (len(self.first) + len(then))


def calibrated(
    view: ServerView,
    scale: float | None,
    sent: Callable[[float], Broadcast],
    read: Callable[[Sequence[Batch], Observation], Trial],
    *,
    leaking: int,
    names: Sequence[str] = (WEIGHT, BIAS),
    generator: torch.Generator,
) -> tuple[float, Trial]:
    """The scale of a crafted model that recovers most in rounds on auxiliary images, and how these went.

    scale: the only one that is tried, None to seek it. All else as in `sought`.
    """
    search = Search((scale,)) if scale is not None else Search(SCALES, finer_scales)
    return sought(view, search, sent, read, leaking=leaking, names=names, generator=generator)


def sought(
    view: ServerView,
    search: Search[S],
    sent: Callable[[S], Broadcast],
    read: Callable[[Sequence[Batch], Observation], Trial],
    *,
    leaking: int,
    names: Sequence[str] = (WEIGHT, BIAS),
    generator: torch.Generator,
) -> tuple[S, Trial]:
    """The setting of a crafted model that recovers most in rounds on auxiliary images, and how these went.

    sent: the broadcast with a setting. read: how a round went, from its clients' batches and what the server sees of
    the tensors in `names`; a round whose update is not finite, as where a client's precision overflows, is a failed
    trial. leaking: how many clients, the first ones, change these tensors. Needs auxiliary images and the recipe.
    """
    auxiliary = view.knowledge.auxiliary
    assert auxiliary is not None  # the attacks see to that
    rounds = [drawn_batches(view, auxiliary, leaking, generator) for _ in range(TRIALS)]

    def attempt(value: S) -> Trial:
        broadcast, trials = sent(value), []
        for batches in rounds:
            observation = simulated(view, broadcast, batches, names, generator)
            trials.append(read(batches, observation) if _finite(observation.update) else FAILED)
        return together(trials)

    best, trial = best_of(search.first, attempt)
    then = search.then(best)
    return best_of(then, attempt) if then else (best, trial)


def finer_scales(scale: float) -> tuple[float, ...]:
    """One of `SCALES` and the scales beside it."""
    return scale, scale * FINER, scale / FINER


def rounds_played(scale: float | None) -> int:
    """How many rounds `calibrated` simulates."""
    return Search((scale,)).rounds if scale is not None else Search(SCALES, finer_scales).rounds


def how_it_went(named: str, sought: bool, trial: Trial, read: str) -> str:
    """What the report says of a crafted model's numbers.

    >>> how_it_went("scale 0.01", True, Trial(0.5, 60.0, 0.0), "the images alone in their bin")
    'scale 0.01 was calibrated: in 2 rounds on auxiliary images 50% of the images alone in their bin came back above 30 dB'
    """
    return (
        f"{named}{' was calibrated' if sought else ''}: in {TRIALS} rounds on auxiliary images {trial.share:.0%} of "
        f"{read} came back above 30 dB"
    )


def why_no_rounds(scale: float | None, recipe: Recipe | None) -> str | None:
    """The reason why a scale that is to be sought (None) cannot be."""
    if scale is not None or recipe is not None:
        return None
    return "the recipe is withheld, so no round can be played through: give `scale` a number"


def auxiliary_images(view: ServerView, attack: str, fewest: int = 2) -> Auxiliary:
    """The auxiliary images; raises `AttackFailure` where there are fewer."""
    auxiliary = view.knowledge.auxiliary
    if auxiliary is None or len(auxiliary.images) < fewest:
        raise AttackFailure(
            f"{attack} needs at least {fewest} auxiliary images: grant `auxiliary` and leave images for it"
        )
    return auxiliary


def simulated(
    view: ServerView,
    broadcast: Broadcast,
    batches: Sequence[Batch],
    names: Sequence[str],
    generator: torch.Generator,
) -> Observation:
    """What the server would see of a round with these clients, of the tensors in `names` only.

    batches: what the first clients hold. All others are taken to change none of these tensors. The channel treats
    every tensor on its own, so that those that are left out change nothing either. A defense that the server knows is
    played through too. Needs the recipe, which is `view.recipe` whatever the broadcast says.
    """
    recipe = view.recipe
    assert recipe is not None  # attacks refuse to calibrate without
    defense = known_defense(view.knowledge.defense)

    def updates() -> Iterator[Update]:
        for client in range(view.clients):
            model = broadcast.model(client)
            if client < len(batches):
                update, _ = client_step(model, batches[client], recipe, hooks=defense, generator=generator)
                yield _only(update, names)
            else:
                unchanged = _unchanged(model, recipe, names, view.examples)
                yield defense.update(unchanged, model, ClientState(), generator)[0]

    return Observation(
        model=broadcast.model(0),
        update=view.channel.told(broadcast.aggregation).send(updates(), generator),
        recipe=recipe,
        threat_model=view.threat_model,
        clients=view.clients,
        broadcast=broadcast,
    )


def drawn_batches(view: ServerView, auxiliary: Auxiliary, clients: int, generator: torch.Generator) -> list[Batch]:
    """Images for so many clients: auxiliary ones, each once, and where these are too few mixtures of two of them.

    A mixture has the first one's label. The same image twice would share its bin with itself in every round, so that
    no size could be told from another.
    """
    needed, owned = view.examples * clients, len(auxiliary.images)
    places = torch.cat([torch.randperm(owned, generator=generator) for _ in range(-(-needed // owned))])[:needed]
    images, targets = (one[places.to(one.device)] for one in (auxiliary.images, auxiliary.targets))
    if needed > owned:
        others = auxiliary.images[torch.randint(owned, (needed - owned,), generator=generator).to(images.device)]
        shares = torch.rand((needed - owned, *[1] * (images.ndim - 1)), generator=generator).to(images)
        images[owned:] = torch.lerp(images[owned:], others, shares)
    parts = zip(torch.split(images, view.examples), torch.split(targets, view.examples), strict=True)
    return [Batch(*part) for part in parts]


def rounding_floor(steps: Tensor, counts: Tensor) -> float:
    """The size below which a bias gradient is rounding: the largest of what bins without images show.

    steps: what each bin shows (K,). counts: how many images it holds (K,). Where an empty bin shows as much as full ones,
    the client's precision moves images to other bins; rounding is then what most bins stay below, with a margin.
    """
    empty = steps[counts == 0].abs().double()
    if not len(empty):
        return 0.0
    most = float(empty.max())
    shown = steps.abs().double().sort(descending=True).values[: int((counts > 0).sum())]
    if most * ROUNDING_MARGIN <= float(shown.median()):
        return ANOTHER_ROUND * most
    return min(most, ROUNDING_MARGIN * float(empty.quantile(0.75)))


def judged(readable: Tensor, found: Tensor, floor: float) -> Trial:
    """How well the images that can be read (N, ...) came back among those that were found (M, ...)."""
    if not len(readable) or not len(found):
        return Trial(0.0, 0.0, floor)
    distances = torch.cdist(readable.double().flatten(1), found.double().flatten(1)).amin(dim=1)
    errors = distances.square() / readable[0].numel()
    psnr = (-10 * errors.clamp_min(MSE_FLOOR).log10()).clamp_min(0)
    return Trial(float((errors <= RECOVERED).double().mean()), float(psnr.mean()), floor)


def together(trials: Sequence[Trial]) -> Trial:
    """Means over several rounds, and the largest floor."""
    count = len(trials)
    return Trial(
        share=sum(trial.share for trial in trials) / count,
        psnr=sum(trial.psnr for trial in trials) / count,
        floor=max(trial.floor for trial in trials),
    )


def best_of(values: Sequence[S], attempt: Callable[[S], Trial]) -> tuple[S, Trial]:
    """The value whose trial recovered most; of those that are as good, the first of the ones with the clearest images."""
    trials = [(value, attempt(value)) for value in values]
    most = max(trial.share for _, trial in trials)
    return max((pair for pair in trials if pair[1].share >= most - AS_GOOD), key=lambda pair: min(pair[1].psnr, CLEAR))


def _finite(update: Update) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in update.trainable.values())


def _only(update: Update, names: Sequence[str]) -> Update:
    return replace(update, trainable={name: update.trainable[name] for name in names}, buffers={}, counters={})


def _unchanged(model: GlobalModel, recipe: Recipe, names: Sequence[str], examples: int) -> Update:
    """What a client sends of tensors that get no gradient."""
    sent: dict[str, Tensor] = {}
    for name in names:
        old = model.parameters[name]
        if recipe.update == "gradient":
            sent[name] = torch.zeros_like(old)
        else:
            moved = idle_change(old, recipe).to(old.dtype)
            sent[name] = moved if recipe.update == "delta" else old + moved
    return Update(recipe.update, sent, {}, {}, examples)
