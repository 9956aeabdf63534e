"""An attacker rehearses on clients of its own making: how far off is what it finds?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from medpfl.attacks.known_defense import known_defense
from medpfl.attacks.labels import infer_labels
from medpfl.attacks.matching.inversion import invert
from medpfl.attacks.matching.learnt.variations import varied
from medpfl.attacks.matching.settings import Inversion
from medpfl.core.domain import Auxiliary, Batch, Observation, Recipe, Reconstruction
from medpfl.core.functional import assignment
from medpfl.core.session import NO_SESSION
from medpfl.federation.client import client_step

UNKNOWN = 0.1
"""Error that is supposed where no rehearsal came to an end, of images in [0, 1]."""


def rehearsed_errors(observations: Sequence[Observation], count: int, settings: Inversion) -> list[tuple[float, int]]:
    """For every observation the root mean squared error of an attack with these settings, and the evaluations spent.

    Each is rehearsed `count` times with the model of the observation: a simulated client with varied auxiliary images of
    the labels that the update shows answers under the known defense. Needs auxiliary images.
    """
    generator = torch.Generator().manual_seed(0)
    clients = [_clients(one, count, generator.clone_state()) for one in observations]
    played = [seen for several in clients for seen, _ in several]
    results = invert(
        played, [torch.Generator().manual_seed(place) for place in range(len(played))], NO_SESSION, settings
    )
    found, place = [], 0
    for several in clients:
        own = results[place : place + len(several)]
        place += len(several)
        whole = [(one, truth) for one, (_, truth) in zip(own, several, strict=True) if isinstance(one, Reconstruction)]
        squares = [_squared_error(one.images, truth) for one, truth in whole if len(one.images)]
        error = (sum(squares) / len(squares)) ** 0.5 if squares else UNKNOWN
        found.append((error, sum(one.gradient_evaluations for one, _ in whole)))
    return found


def _clients(observation: Observation, count: int, generator: torch.Generator) -> list[tuple[Observation, Tensor]]:
    """Simulated observations and the images that they are of."""
    auxiliary = observation.knowledge.auxiliary
    assert auxiliary is not None  # the attack sees to that
    labels = (
        observation.knowledge.labels if observation.knowledge.labels is not None else infer_labels(observation).labels
    )
    recipe = observation.recipe or Recipe()
    hooks = known_defense(observation.knowledge.defense)
    found = []
    for _ in range(count):
        chosen = _alike(auxiliary, labels, observation.examples, generator)
        images = varied(auxiliary.images[chosen], generator)
        targets = auxiliary.targets[chosen]
        batch = Batch(images, targets)
        *earlier, update = [
            client_step(observation.model, batch, recipe, hooks=hooks, generator=generator)[0]
            for _ in range(1 + len(observation.earlier))
        ]
        knowledge = replace(observation.knowledge, labels=targets)
        found.append((replace(observation, update=update, earlier=tuple(earlier), knowledge=knowledge), images))
    return found


def _alike(auxiliary: Auxiliary, labels: Tensor | None, count: int, generator: torch.Generator) -> Tensor:
    """Places of `count` auxiliary images with these labels, any images where there are none of a label."""
    everything = torch.arange(len(auxiliary.images))
    wanted = [None] * count if labels is None or labels.ndim != 1 else labels.tolist()
    places = []
    for label in wanted:
        same = everything if label is None else torch.nonzero(auxiliary.targets.cpu() == label).flatten()
        pool = same if len(same) else everything
        places.append(pool[torch.randint(len(pool), (), generator=generator)])
    return torch.stack(places).to(auxiliary.images.device)


def _squared_error(images: Tensor, truth: Tensor) -> float:
    """Mean over the paired images."""
    cost = torch.cdist(truth.cpu().flatten(1).double(), images.cpu().flatten(1).double()).square() / truth[0].numel()
    rows, columns = assignment(cost)
    return float(cost[rows, columns].mean())
