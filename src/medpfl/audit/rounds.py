"""One round of a cell: what its server sends, who takes part, what arrives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from medpfl.attacks.crafted import CraftedAttack, ServerView, beyond_capabilities
from medpfl.audit.grid import Cell
from medpfl.audit.materials import Materials
from medpfl.core.devices import moved
from medpfl.core.domain import Batch, Broadcast, ClientState, GlobalModel, Knowledge, Recipe
from medpfl.core.errors import AttackFailure
from medpfl.core.mechanisms import Mechanism, sent_names
from medpfl.core.seeding import generator
from medpfl.core.session import NO_SESSION, Session
from medpfl.federation.rounds import RoundResult, followed_recipe, guarded_round, repeated_round


def broadcast(materials: Materials, cell: Cell, seed: int, victim: int, session: Session = NO_SESSION) -> Broadcast:
    """What the cell's server sends: the model as agreed, or what a crafted attack prepared, once per cell and seed.

    `victim` matters only for models of which every victim has its own. session: of the chunk that it is prepared for.
    """
    model = materials.model(cell, seed, victim)
    attack = cell.attack.attack
    if not isinstance(attack, CraftedAttack):
        return Broadcast((model,))
    own = victim if cell.model.state == "untrained_per_victim" else None
    auxiliary = materials.auxiliary(cell, seed) if "auxiliary" in cell.read else None
    view = ServerView(
        model=model,
        recipe=known_recipe(cell),
        update=cell.recipe.recipe.update,
        channel=cell.channel.channel,
        examples=cell.recipe.recipe.private_images,
        threat_model=cell.threat_model.name,
        can=cell.threat_model.can,
        knowledge=moved(Knowledge(auxiliary=auxiliary, defense=known_defense(cell)), materials.device),
        session=session,
    )
    stream = generator("prepare", seed, cell.stream, *(() if own is None else (own,)))

    def prepared() -> Broadcast:
        sent = attack.prepare(view, stream)
        if (beyond := beyond_capabilities(view, sent)) is not None:
            raise AttackFailure(f"{cell.attack.name} sent {beyond}, which the threat model does not allow")
        return sent

    return materials.latest("broadcast", (cell.id, seed, own), prepared)


def seen_model(materials: Materials, cell: Cell, seed: int, victim: int) -> GlobalModel:
    """The victim's model as the adversary takes it: tensors that clients do not send are constants."""
    own = victim if cell.model.state == "untrained_per_victim" else None
    model = broadcast(materials, cell, seed, victim).model(0)
    return materials.latest("seen", (cell.id, seed, own), lambda: as_sent(cell, model))


def as_sent(cell: Cell, model: GlobalModel) -> GlobalModel:
    """The model with all that the cell's clients do not send as constants."""
    return model.training_only(sent_names(cell.defense.defense.mechanism(), model.parameters))


def known_recipe(cell: Cell) -> Recipe | None:
    """The clients' recipe as far as the cell's adversary knows it."""
    return None if "recipe" in cell.threat_model.withhold else cell.recipe.recipe


def followed(cell: Cell, sent: Broadcast) -> Recipe:
    """How the cell's clients train on what they were sent."""
    return followed_recipe(sent, cell.recipe.recipe, cell.defense.defense)


def known_defense(cell: Cell) -> Mechanism | None:
    """The mechanism of the client's defense, where the attack reads it and it is granted."""
    return cell.defense.defense.mechanism() if "defense" in cell.read else None


def client_round(materials: Materials, cell: Cell, seed: int, victim: int) -> RoundResult:
    """What becomes of one victim's round: all its clients have the cell's guard.

    Of several rounds with the same model and images the last one, with what arrived before.
    """
    clients = list(_clients(materials, cell, seed, victim)) if cell.recipe.recipe.rounds > 1 else None
    stream = generator("channel", seed, cell.dataset.id, victim, cell.channel.stream)

    def one(states: Mapping[int, ClientState]) -> RoundResult:
        return guarded_round(
            broadcast(materials, cell, seed, victim),
            _clients(materials, cell, seed, victim) if clients is None else clients,
            cell.recipe.recipe,
            hooks=cell.defense.defense,
            guard=cell.guard.guard,
            agreed=materials.model(cell, seed, victim),
            channel=cell.channel.channel,
            states=states,
            generator=stream,
        )

    return repeated_round(one, cell.recipe.recipe.rounds)


def _clients(materials: Materials, cell: Cell, seed: int, victim: int) -> Iterator[tuple[Batch, torch.Generator]]:
    axes = (cell.model.stream, cell.recipe.stream, cell.defense.stream)
    for client in range(cell.channel.channel.client_count):
        held = materials.client(cell, seed, victim, client)
        stream = generator("client", seed, cell.dataset.id, victim, *axes, *([client] if client else []))
        yield moved(Batch(held.images, held.targets), materials.device), stream
