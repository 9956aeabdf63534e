"""One round that a malicious server prepared, played through on images, for the tests of crafted attacks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from attacked_rounds import attacked_round, count_recovered
from torch import Tensor

from medpfl.attacks.crafted import CraftedAttack
from medpfl.core.domain import Auxiliary, Batch, Broadcast, GlobalModel, Observation, Recipe, Reconstruction
from medpfl.data.dataset import Dataset
from medpfl.federation import Channel, Plain
from medpfl.models import build_model

SGD = Recipe(update="weights", learning_rate=0.1)


@dataclass(frozen=True)
class Round:
    """One attacked round: the private images that the attack is after, and what came back."""

    private: Tensor
    broadcast: Broadcast
    observation: Observation
    result: Reconstruction

    @property
    def recovered(self) -> int:
        """Private images above 30 dB, one candidate each."""
        return count_recovered(self.private, self.result.images)


def lenet(images: Dataset, seed: int) -> GlobalModel:
    """An untrained LeNet for these images."""
    shape, generator = tuple(images.images.shape[1:]), torch.Generator().manual_seed(seed)
    return build_model("lenet_idlg", image_shape=shape, task=images.task, generator=generator)


def attacked(
    attack: CraftedAttack,
    data: Dataset,
    size: int,
    *,
    channel: Channel | None = None,
    recipe: Recipe = SGD,
    model: GlobalModel | None = None,
    seed: int = 0,
    sought: int | None = None,
    places: Tensor | None = None,
    **other: Any,
) -> Round:
    """One round of clients with `size` images each that are not among the auxiliary ones.

    sought: how many clients' images the attack is after, all by default. places: those of the private images in the
    data; drawn by default. other: as in `attacked_round`.
    """
    channel = channel or Plain()
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    held = order[: size * channel.client_count] if places is None else places
    owned = order[~torch.isin(order, held)]
    batches = [Batch(data.images[part], data.targets[part]) for part in torch.split(held, size)]
    found = attacked_round(
        attack,
        model or lenet(data, seed),
        batches,
        Auxiliary(data.images[owned], data.targets[owned]),
        replace(recipe, batch_size=size // recipe.local_steps),
        channel=channel,
        seed=seed,
        **other,
    )
    private = torch.cat([batch.images for batch in batches[:sought]])
    return Round(private, found.broadcast, found.observation, found.result)


def alone_between(edges: Tensor, values: Tensor) -> int:
    """How many values are the only ones between two neighbors of the edges, counted one by one."""
    counted = [
        [value for value in values.tolist() if low < value <= high]
        for low, high in zip(edges.tolist(), edges.tolist()[1:], strict=False)
    ]
    return sum(len(held) == 1 for held in counted)
