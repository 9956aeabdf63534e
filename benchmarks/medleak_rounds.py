"""Rounds that MedLeak's server attacks, and the classifiers that are trained on what they bring: shared by
`medleak_downstream.py` and `medleak_cost.py`.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import special, stats
from torch import Tensor

from medpfl.attacks.crafted import CraftedAttack, ServerView
from medpfl.core.domain import Auxiliary, Batch, Broadcast, GlobalModel, Knowledge, Observation, Recipe, Reconstruction
from medpfl.core.seeding import generator
from medpfl.data import Dataset, load_dataset
from medpfl.data.readers.medmnist import MedMnistReader
from medpfl.data.readers.phantom import PhantomReader
from medpfl.federation import Channel, run_round
from medpfl.models import build_model

NET = "cnn3"


@dataclass(frozen=True)
class Images:
    """Images (N, C, H, W) with labels (N,)."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, places: Tensor) -> Images:
        return Images(self.images[places], self.labels[places])

    @property
    def batch(self) -> Batch:
        """As a client's batch."""
        return Batch(self.images, self.labels)


@dataclass(frozen=True)
class Divided:
    """Images for one seed: what the server owns, what clients hold, and what classifiers are judged on."""

    auxiliary: Images
    clients: Images
    test: Images


DATA = ("pneumoniamnist", "mednist", "phantom")


def dataset(name: str) -> tuple[Dataset, Dataset | None]:
    """Images for server and clients, and test images: of the shared data, or drawn chest films.

    `mednist` (six body parts) has no test images of its own: all that a division leaves over are.
    """
    folder = Path(os.environ.get("MEDPFL_DATA", "."), "medmnist")
    if name == "mednist":
        return load_dataset(MedMnistReader(path=folder / "mednist_64_subset.npz"), name=name, size=28, channels=1), None
    if name == "pneumoniamnist":
        path = folder / "pneumoniamnist_subset.npz"
        readers = [MedMnistReader(path=path, splits=splits) for splits in (("train", "val"), ("test",))]
    else:
        readers = [
            PhantomReader(kind="chest", count=count, resolution=28, seed=seed) for count, seed in ((4000, 0), (600, 1))
        ]
    own, test = (load_dataset(reader, name=name, size=28, channels=1) for reader in readers)
    return own, test


def divided(sets: tuple[Dataset, Dataset | None], auxiliary: int, clients: int, seed: int) -> Divided:
    """A random division for this seed in which classes take turns; test images are all of the test split, or the rest."""
    own = Images(sets[0].images, sets[0].targets)
    order = torch.randperm(len(own), generator=generator("division", seed))
    parts = [order[own.labels[order] == label] for label in own.labels.unique()]
    order = torch.stack([part[: min(map(len, parts))] for part in parts], dim=1).flatten()
    rest = own[order[auxiliary + clients :]]
    test = rest if sets[1] is None else Images(sets[1].images, sets[1].targets)
    return Divided(own[order[:auxiliary]], own[order[auxiliary : auxiliary + clients]], test)


def new_model(sets: tuple[Dataset, Dataset | None], seed: int, number: int = 0) -> GlobalModel:
    """An untrained net for these images, one of several."""
    shape = tuple(sets[0].images.shape[1:])
    return build_model(
        NET, image_shape=shape, task=sets[0].task, generator=generator("net", seed, *[number] * (number > 0))
    )


def crafted(
    attack: CraftedAttack, model: GlobalModel, auxiliary: Images, recipe: Recipe, channel: Channel, seed: int
) -> Broadcast:
    """What the server prepares from its own images."""
    view = ServerView(
        model=model,
        recipe=recipe,
        update=recipe.update,
        channel=channel,
        examples=recipe.private_images,
        threat_model="malicious_server",
        can=attack.needs(),
        knowledge=Knowledge(auxiliary=Auxiliary(auxiliary.images, auxiliary.labels)),
    )
    return attack.prepare(view, generator("prepare", seed))


def stolen(
    attack: CraftedAttack, broadcast: Broadcast, clients: Sequence[Images], recipe: Recipe, channel: Channel, seed: int
) -> Reconstruction:
    """What comes back of one attacked round; the first client is the victim."""
    draws = generator("round", seed)
    update = run_round(broadcast, [(one.batch, draws) for one in clients], recipe, channel=channel, generator=draws)
    observation = Observation(
        broadcast.model(0), update, recipe, "malicious_server", clients=len(clients), broadcast=broadcast
    )
    (result,) = attack.reconstruct([observation], [draws])
    if not isinstance(result, Reconstruction):
        raise SystemExit(f"the attack failed: {result.reason}")
    return result


@torch.no_grad()
def outputs(model: GlobalModel, images: Tensor) -> Tensor:
    """Class scores (N, classes)."""
    return torch.cat([model.forward(part)[0] for part in torch.split(images, 512)])


def balanced_accuracy(scores: Tensor, labels: Tensor) -> float:
    """Mean over classes of the share that is found."""
    hits = scores.argmax(dim=1) == labels
    return float(torch.stack([hits[labels == name].float().mean() for name in labels.unique()]).mean())


def auc(scores: Tensor, labels: Tensor) -> float:
    """Area under the ROC curve, mean over classes against the rest: the share of pairs in the right order."""
    found = []
    for name in labels.unique().tolist():
        ranks = stats.rankdata(scores.softmax(dim=1)[:, name].double().numpy())
        positive = (labels == name).numpy()
        count = positive.sum()
        found.append((ranks[positive].sum() - count * (count + 1) / 2) / (count * (~positive).sum()))
        if scores.shape[1] == 2:
            break
    return float(np.mean(found))


@dataclass(frozen=True)
class Spread:
    """A mean over seeds with its t interval."""

    mean: float
    low: float
    high: float


Scale = Literal["plain", "share", "size"]

NEAREST_TO_BOUND = 1e-3
"""Shares nearer to 0 or 1 count as this far away: about half a test image."""


def spread(values: Sequence[float] | NDArray[np.float64], level: float = 0.95, scale: Scale = "plain") -> Spread:
    """Mean and t interval of values that are independent given the data.

    scale: of a `share` (accuracy, AUC) both are computed from logits and mapped back, of a `size` (loss, length) from
    logarithms, so that the interval stays within [0, 1] or above 0.

    >>> found = spread([0.9, 0.95, 0.99], scale="share")
    >>> 0 < found.low < 0.9 < found.mean < 0.99 < found.high < 1
    True
    """
    found = np.asarray(values, dtype=np.float64)
    if scale == "share":
        found = special.logit(found.clip(NEAREST_TO_BOUND, 1 - NEAREST_TO_BOUND))
    if scale == "size":
        found = np.log(found)
    half = float("nan")  # one value has no interval
    if len(found) > 1:
        half = float(stats.t.ppf((1 + level) / 2, len(found) - 1) * stats.sem(found))
    ends = np.array([found.mean(), found.mean() - half, found.mean() + half])
    back = {"plain": ends, "share": special.expit(ends), "size": np.exp(ends)}[scale]
    return Spread(*(float(end) for end in back))


def equivalence(differences: Sequence[float], margin: float) -> float:
    """The p-value of two one-sided t tests (TOST): small if the mean difference lies within +- margin."""
    found = np.asarray(differences, dtype=np.float64)
    if len(found) < 2:
        return float("nan")
    if float(found.std()) == 0:
        return 0.0 if abs(float(found.mean())) < margin else 1.0
    lower = stats.ttest_1samp(found, -margin, alternative="greater").pvalue
    upper = stats.ttest_1samp(found, margin, alternative="less").pvalue
    return float(max(lower, upper))


def shuffled_batches(images: Images, size: int, seed: int) -> list[Images]:
    """Full batches of the images in a random order."""
    order = torch.randperm(len(images), generator=generator("batches", seed))
    return [images[part] for part in torch.split(order, size) if len(part) == size]


def as_recipe(batch: int, update: str = "weights") -> Recipe:
    """One local step of SGD on one batch."""
    return replace(Recipe(learning_rate=0.1), update=update, batch_size=batch)
