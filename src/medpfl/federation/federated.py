"""A whole federation in a loop: rounds of the same client step that is audited, under the same defense.

What a defense costs is measured with it: clients train and defend as in the audited round, their state goes on from
round to round, the server averages what arrives and learns from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass as config_dataclass
from torch import Tensor

from medpfl.core.config import STRICT
from medpfl.core.devices import moved
from medpfl.core.domain import Batch, ClientState, GlobalModel, Recipe, Tensors, Update
from medpfl.core.session import NO_SESSION, Session, State
from medpfl.federation.channels import Channel
from medpfl.federation.client import client_step
from medpfl.federation.hooks import NO_HOOKS, Hooks
from medpfl.federation.optimizers import OPTIMIZERS, OptimizerState
from medpfl.federation.partitions import Partition
from medpfl.federation.secure import SecureSum

SMALLEST_BATCH = 16
"""Images per step where the attacked recipe takes fewer: one image a step is a set-up for attacks, not for training."""

Streams = Callable[..., torch.Generator]
"""(name, *keys) -> a fresh generator for that stream."""

EXACT = SecureSum()
"""The server's mean where updates arrive as they are."""


@config_dataclass(frozen=True, kw_only=True, config=STRICT)
class FederationConfig:
    """How the federation trains in which the price of defenses is measured.

    What is sent follows the cell's recipe, because a defense's strength means something for that only. Of a recipe with
    `update: gradient` a client sends one gradient per batch, and the server takes an optimizer step on their mean; a
    round is `local_epochs` passes over the clients' images. With `delta` or `weights` a client takes `local_epochs`
    passes with the recipe's optimizer and sends once per round. All else is the recipe's.
    """

    rounds: Annotated[int, Field(ge=1, description="rounds of the federation")] = 20
    clients: Annotated[
        int, Field(ge=2, description="clients that share the training images; not with partition: site")
    ] = 4
    partition: Annotated[
        Partition,
        Field(description="iid: clients alike; site: a client per hospital; dirichlet: clients with unlike classes"),
    ] = "iid"
    concentration: Annotated[float, Field(gt=0, description="of partition: dirichlet; small is more unlike")] = 0.5
    batch_size: Annotated[
        int | None, Field(ge=1, description=f"images per step; default the recipe's, at least {SMALLEST_BATCH}")
    ] = None
    local_epochs: Annotated[
        int | None, Field(ge=1, description="passes of a client over its images per round; default the recipe's epochs")
    ] = None
    optimizer: Annotated[
        Literal["sgd", "adam", "adamw"] | None,
        Field(
            description="takes the steps: the server's for gradients (default adam), else the client's (the recipe's)"
        ),
    ] = None
    learning_rate: Annotated[
        float | None, Field(gt=0, description="of these steps; default 0.001 for gradients, else the recipe's")
    ] = None
    server_learning_rate: Annotated[
        float, Field(gt=0, description="share of the mean change that the server takes over, for delta and weights")
    ] = 1.0

    def recipe(self, attacked: Recipe) -> Recipe:
        """How clients train, and for gradients the server's optimizer, given the recipe of the attacked cell.

        >>> FederationConfig().recipe(Recipe(update="gradient")).optimizer
        'adam'
        """
        gradients = attacked.update == "gradient"
        return replace(
            attacked,
            batch_size=self.batch_size or max(SMALLEST_BATCH, attacked.batch_size),
            local_steps=1,
            epochs=self.local_epochs or attacked.epochs,
            images=None,
            shuffle=True,
            optimizer=self.optimizer or ("adam" if gradients else attacked.optimizer),
            learning_rate=self.learning_rate or (0.001 if gradients else attacked.learning_rate),
        )


@dataclass(frozen=True)
class _Setting:
    """What stays the same from round to round."""

    clients: Sequence[Batch]
    recipe: Recipe
    rate: float
    hooks: Hooks
    channel: Channel

    def aggregated(self, updates: Sequence[Update], channel: torch.Generator, server: torch.Generator) -> Update:
        """What the server learns from."""
        return self.hooks.aggregated(self.channel.send(updates, channel), len(updates), server)


@dataclass(frozen=True)
class _Server:
    """The global model, the server's optimizer (for gradients only) and what each client keeps between rounds."""

    model: GlobalModel
    optimizer: OptimizerState
    clients: tuple[ClientState, ...]


def federate(
    model: GlobalModel,
    clients: Sequence[Batch],
    recipe: Recipe,
    config: FederationConfig,
    streams: Streams,
    *,
    hooks: Hooks = NO_HOOKS,
    channel: Channel = EXACT,
    session: Session = NO_SESSION,
) -> GlobalModel:
    """The global model after `config.rounds` rounds.

    model: what the first round starts from, as the defense wants it (`hooks.model`). clients: their images and targets.
    recipe: `config.recipe` of the attacked one. streams: the order of images and the defense's randomness, a fresh
    stream for each round and client, so that every defense meets the same orders. channel: how updates become one.
    A step takes at most as many images as a client has. Goes on from the session's last snapshot bit by bit.
    """
    model = model.to(torch.float64 if recipe.precision == "float64" else torch.float32)
    server = _start(model, len(clients))
    snapshot = session.restore()
    first = 0
    if snapshot is not None:
        first, server = int(snapshot["round"]), _restored(snapshot, server)
    setting = _Setting(clients, recipe, config.server_learning_rate, hooks, channel)
    play = _gradient_round if recipe.update == "gradient" else _training_round
    for number in range(first, config.rounds):
        server = play(server, setting, partial(streams, number))
        session.checkpoint(number + 1, config.rounds, partial(_snapshot, number + 1, server))
    return server.model


def outputs(model: GlobalModel, images: Tensor, size: int = 256) -> Tensor:
    """The model's outputs for images (n, ...), computed `size` at a time, batch norm in eval mode."""
    with torch.no_grad():
        dtype, device = next(iter(model.parameters.values())).dtype, model.device
        return torch.cat([model.forward(part.to(device, dtype))[0].cpu() for part in torch.split(images, size)])


def _training_round(server: _Server, setting: _Setting, streams: Streams) -> _Server:
    """FedAvg: every client trains on its images and sends once."""
    updates: list[Update] = []
    states: list[ClientState] = []
    for client, batch in enumerate(setting.clients):
        update, state = client_step(
            server.model,
            batch,
            fitted(setting.recipe, len(batch)),
            hooks=setting.hooks,
            state=server.clients[client],
            generator=streams("client", client),
        )
        updates.append(update)
        states.append(state)
    mean = setting.aggregated(updates, streams("channel"), streams("server"))
    return _Server(_learnt(server.model, mean, setting.rate), server.optimizer, tuple(states))


def fitted(recipe: Recipe, images: int) -> Recipe:
    """The recipe of a client with so many images: one batch for a gradient, else steps that pass over all of them."""
    size = min(recipe.batch_size, images)
    own = replace(recipe, batch_size=size, accumulation=min(recipe.accumulation, size))
    if recipe.update == "gradient":
        return replace(own, epochs=1, shuffle=False)
    return replace(own, local_steps=-(-images // size), images=images)


def _gradient_round(server: _Server, setting: _Setting, streams: Streams) -> _Server:
    """FedSGD: gradients of all clients' next batches, averaged, until every client has passed over its images."""
    clients, recipe = setting.clients, setting.recipe
    orders = [_order(len(batch), recipe, streams("order", client)) for client, batch in enumerate(clients)]
    drawn = [_draws(setting, len(batch), streams("probe")) for batch in clients]
    states = list(server.clients)
    model, optimizer = server.model, server.optimizer
    for exchange in range(max(len(order) for order in orders)):
        updates: list[Update] = []
        for client, order in enumerate(orders):
            if exchange < len(order):
                whole, places = clients[client], order[exchange]
                batch = whole if drawn[client] else Batch(whole.images[places], whole.targets[places])
                own = fitted(recipe, len(batch))
                stream = streams("client", client, exchange)
                update, states[client] = client_step(
                    model, batch, own, hooks=setting.hooks, state=states[client], generator=stream
                )
                updates.append(update)
        mean = setting.aggregated(updates, streams("channel", exchange), streams("server", exchange))
        sent = {name: tensor for name, tensor in model.parameters.items() if name in mean.trainable}
        gradients = {name: mean.trainable[name].to(tensor) for name, tensor in sent.items()}
        moved_on, optimizer = OPTIMIZERS[recipe.optimizer](sent, gradients, optimizer, recipe)
        model = _with_statistics(replace(model, parameters={**model.parameters, **moved_on}), mean)
    return _Server(model, optimizer, tuple(states))


def _draws(setting: _Setting, images: int, generator: torch.Generator) -> bool:
    """Whether the defense itself draws which of a client's images a step takes."""
    return setting.hooks.steps(images, fitted(setting.recipe, images), generator) is not None


def _order(images: int, recipe: Recipe, generator: torch.Generator) -> list[Tensor]:
    """The batches of all passes of a round: places of images."""
    passes = [torch.randperm(images, generator=generator) for _ in range(recipe.epochs)]
    return [places for order in passes for places in torch.split(order, recipe.batch_size)]


def _learnt(model: GlobalModel, mean: Update, rate: float) -> GlobalModel:
    """The global model moved by the clients' mean change; what they did not send stays."""
    parameters: dict[str, Tensor] = {}
    for name, tensor in model.parameters.items():
        sent = mean.trainable.get(name)
        change = None if sent is None else sent if mean.kind == "delta" else sent - tensor.double()
        parameters[name] = tensor if change is None else (tensor.double() + rate * change).to(tensor)
    return _with_statistics(replace(model, parameters=parameters), mean)


def _with_statistics(model: GlobalModel, mean: Update) -> GlobalModel:
    """The model with the clients' mean buffers and counters, as far as they were sent."""

    def taken(own: Mapping[str, Tensor], sent: Mapping[str, Tensor]) -> Tensors:
        return {name: sent[name].to(tensor) if name in sent else tensor for name, tensor in own.items()}

    return replace(model, buffers=taken(model.buffers, mean.buffers), counters=taken(model.counters, mean.counters))


def _start(model: GlobalModel, clients: int) -> _Server:
    zeros = {name: torch.zeros_like(tensor) for name, tensor in model.parameters.items()}
    steps = torch.zeros((), dtype=torch.int64, device=model.device)
    return _Server(model, OptimizerState(steps, zeros, zeros), (ClientState(),) * clients)


def _snapshot(number: int, server: _Server) -> State:
    model, optimizer = server.model, server.optimizer
    return {
        "round": number,
        "parameters": dict(model.parameters),
        "buffers": dict(model.buffers),
        "counters": dict(model.counters),
        "steps": optimizer.steps,
        "first": dict(optimizer.first),
        "second": dict(optimizer.second),
        "clients": [{"rounds": state.rounds, "tensors": dict(state.tensors)} for state in server.clients],
    }


def _restored(snapshot: State, start: _Server) -> _Server:
    snapshot = moved(snapshot, start.model.device)
    tensors = {part: snapshot[part] for part in ("parameters", "buffers", "counters")}
    return _Server(
        replace(start.model, **tensors),
        OptimizerState(snapshot["steps"], snapshot["first"], snapshot["second"]),
        tuple(ClientState(kept["rounds"], kept["tensors"]) for kept in snapshot["clients"]),
    )
