"""One round: what the server sends, what the clients make of it, what arrives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import torch

from medpfl.core.domain import Batch, Broadcast, ClientState, GlobalModel, Recipe, Update
from medpfl.federation.channels import PLAIN, Channel
from medpfl.federation.client import client_step, drawn_steps
from medpfl.federation.guarding import NO_GUARD, Guarding, Received, Trained, Verdict
from medpfl.federation.hooks import NO_HOOKS, Hooks


@dataclass(frozen=True)
class RoundResult:
    """What became of a round.

    update: what arrives; None where no client sent anything. senders: the numbers of the clients whose updates are in
    it, the victim being 0. verdicts: for each client what its guard found, before training and after; it stays with
    the client. states: what each client keeps for its next round, by number. earlier: what arrived of the same clients in
    earlier rounds with the same model and images, the first one first.
    """

    update: Update | None
    senders: tuple[int, ...]
    verdicts: tuple[tuple[Verdict, ...], ...]
    states: Mapping[int, ClientState] = field(default_factory=dict)
    earlier: tuple[Update, ...] = ()

    def withheld(self, client: int) -> bool:
        """Whether that client sent nothing."""
        return client not in self.senders


def run_round(
    broadcast: Broadcast,
    clients: Iterable[tuple[Batch, torch.Generator]],
    recipe: Recipe,
    *,
    hooks: Hooks = NO_HOOKS,
    channel: Channel = PLAIN,
    generator: torch.Generator,
) -> Update:
    """What arrives when clients train what they were sent, as they were told to, on their private images under a defense.

    clients: images and randomness (orders, defense) of each, the victim first; they train one after the other.
    recipe, channel: as agreed; a broadcast may carry others. generator: the channel's randomness. Raises as `client_step`
    and `Channel.told` do.
    """
    result = guarded_round(broadcast, clients, recipe, hooks=hooks, channel=channel, generator=generator)
    assert result.update is not None  # nothing is withheld without a guard
    return result.update


def guarded_round(
    broadcast: Broadcast,
    clients: Iterable[tuple[Batch, torch.Generator]],
    recipe: Recipe,
    *,
    hooks: Hooks = NO_HOOKS,
    guard: Guarding = NO_GUARD,
    agreed: GlobalModel | None = None,
    channel: Channel = PLAIN,
    states: Mapping[int, ClientState] | None = None,
    generator: torch.Generator,
) -> RoundResult:
    """The same where every client has a guard that may end the round for it; the others' updates still arrive.

    Clients draw the same random numbers with and without a guard. A defense that pins the agreement makes them ignore
    what recipe and parameters of the channel they are told. agreed: the model
    that they agreed on. states: what clients kept of an earlier round.
    """
    kept = dict(states or {})
    told = followed_recipe(broadcast, recipe, hooks)
    verdicts: list[tuple[Verdict, ...]] = []
    senders: list[int] = []

    def updates() -> Iterator[Update]:
        for number, (batch, own) in enumerate(clients):
            received = Received(broadcast.model(number), batch, told, broadcast.models, agreed)
            update, kept[number], found = _guarded_step(received, hooks, guard, kept.get(number), own)
            verdicts.append(found)
            if update is not None:
                senders.append(number)
                yield update

    arriving = updates()
    first = next(arriving, None)
    if first is None:
        return RoundResult(None, (), tuple(verdicts), kept)

    def all_updates() -> Iterator[Update]:
        yield first
        yield from arriving

    if not hooks.pins_agreement:
        channel = channel.told(broadcast.aggregation)
    update = channel.send(all_updates(), generator)
    return RoundResult(update, tuple(senders), tuple(verdicts), kept)


def repeated_round(one: Callable[[Mapping[int, ClientState]], RoundResult], rounds: int) -> RoundResult:
    """The last of so many rounds with the same model and images, and what arrived in the others from the same clients.

    one: plays a round, given what clients kept of the one before.
    """
    played: list[RoundResult] = []
    for _ in range(rounds):
        played.append(one(played[-1].states if played else {}))
    last = played[-1]
    same = (before.update for before in played[:-1] if before.senders == last.senders)
    return replace(last, earlier=tuple(update for update in same if update is not None))


def followed_recipe(broadcast: Broadcast, agreed: Recipe, hooks: Hooks) -> Recipe:
    """How clients train: as they are told, or as agreed where the server tells nothing or the defense pins it."""
    return agreed if broadcast.recipe is None or hooks.pins_agreement else broadcast.recipe


def _guarded_step(
    received: Received, hooks: Hooks, guard: Guarding, state: ClientState | None, generator: torch.Generator
) -> tuple[Update | None, ClientState, tuple[Verdict, ...]]:
    """The update of one client, None if its guard withholds it, what it keeps, and what the guard found.

    A client that withholds its update keeps what it had.
    """
    held = state or ClientState()
    model, batch, recipe = received.model, received.batch, received.recipe
    before = guard.before(received)
    found = () if before is None else (before,)
    if before is not None and before.withholds:
        return None, held, found
    steps = drawn_steps(batch, recipe, hooks, generator)
    update, after_it = client_step(model, batch, recipe, hooks=hooks, state=state, generator=generator, steps=steps)
    after = guard.after(Trained(received, update, steps))
    if after is None:
        return update, after_it, found
    return (None, held, (*found, after)) if after.withholds else (update, after_it, (*found, after))
