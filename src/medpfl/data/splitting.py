"""Victims, bystanders and the pool: who is attacked, who only takes part, and what the adversary may own.

Victims are drawn by seed and stratified by class. Where patients are known, nobody's images are on two sides: no
patient of a victim is a bystander or in the pool, and no patient is in two parts of the pool.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from medpfl.core.errors import DataError
from medpfl.core.seeding import generator
from medpfl.data.dataset import Dataset
from medpfl.data.near_duplicates import near_duplicates_of

PARTS = (0.5, 0.25, 0.25)
"""Shares of the pool: training, auxiliary knowledge, null baselines."""


@dataclass(frozen=True)
class Split:
    """Indices into a data set: one tuple per victim and per bystander, and the three disjoint parts of the pool.

    `near_duplicates` and `dropped_by_patient` count images that belong to nobody because they resemble a victim's or
    bystander's image, or show one of their patients. `notes` say in plain sentences what is unusual.
    """

    victims: tuple[tuple[int, ...], ...]
    bystanders: tuple[tuple[int, ...], ...]
    training: tuple[int, ...]
    auxiliary: tuple[int, ...]
    null: tuple[int, ...]
    near_duplicates: int
    dropped_by_patient: int
    notes: tuple[str, ...] = ()


def split(
    dataset: Dataset,
    *,
    victims: int,
    images_per_victim: int,
    bystanders: int = 0,
    seed: int,
    near_duplicate_threshold: float = 0.95,
    parts: tuple[float, float, float] = PARTS,
    other_victims: Tensor | Sequence[Tensor] | None = None,
) -> Split:
    """Draws victims and bystanders by seed and deals the rest out to the parts of the pool.

    Every bystander holds `images_per_victim` images, too; they are the same whichever victim is attacked. Classes take
    turns over the victims and over the images of a victim. Image j of victim i does not depend on
    `images_per_victim`. Victims show different patients as far as there are any. Half of the patients of each class are used up before the other half is touched, so that a
    pool of other patients remains. `other_victims` are images of victims of other data entries: pool images that
    nearly repeat them are left out, too. Raises DataError if there are too few images, with both numbers.
    """
    draw = generator("victims", seed, dataset.name)
    groups = patient_groups(dataset)
    strata = strata_of(dataset)
    chosen = _draw_victims(dataset, groups, strata, victims, images_per_victim, draw)
    used = [index for victim in chosen for index in victim]
    others_drawn = _draw_bystanders(dataset, groups, strata, used, bystanders, images_per_victim, draw)
    used += [index for bystander in others_drawn for index in bystander]

    taken = {groups[index] for index in used}
    others = [index for index in range(len(dataset)) if groups[index] not in taken]
    dropped_by_patient = len(dataset) - len(used) - len(others)
    repeated = _resembling(dataset, others, used, other_victims, near_duplicate_threshold)
    pool = [index for index, repeats in zip(others, repeated, strict=True) if not repeats]
    training, auxiliary, null = _deal(pool, groups, strata, parts, draw)
    result = Split(
        victims=chosen,
        bystanders=others_drawn,
        training=training,
        auxiliary=auxiliary,
        null=null,
        near_duplicates=len(others) - len(pool),
        dropped_by_patient=dropped_by_patient,
    )
    return _with_notes(result, dataset, near_duplicate_threshold)


def patient_groups(dataset: Dataset) -> list[str]:
    """The patient of each image; an image without one is a group of its own."""
    return [
        f"image {index}" if patient is None else f"patient {patient}" for index, patient in enumerate(dataset.patients)
    ]


def strata_of(dataset: Dataset) -> list[int]:
    """The class of each image; for several labels its rarest positive class, or one past the last where it has none."""
    if not dataset.targets.is_floating_point():
        return [int(label) for label in dataset.targets]
    counts = dataset.targets.sum(dim=0)
    rows = ([label for label, present in enumerate(row) if present] for row in dataset.targets.tolist())
    return [min(row, key=lambda label: (float(counts[label]), label), default=len(counts)) for row in rows]


def _shuffled(values: Sequence[int], draw: torch.Generator) -> list[int]:
    return [values[position] for position in torch.randperm(len(values), generator=draw).tolist()]


@dataclass
class _Queues:
    """Per class the images in the order in which they are drawn, and the order of the classes.

    An image is (whether its patient belongs to the second half, patient, index); `taken` counts images per patient.
    """

    classes: list[int]
    images: dict[int, list[tuple[bool, str, int]]]
    taken: Counter[str] = field(default_factory=Counter)
    _least: dict[int, tuple[bool, int]] = field(default_factory=dict)

    def take(self, turn: int) -> int:
        """The next image of the class whose turn it is, or of the class with the most images left.

        In each half of the patients those come first of whom least was taken, whatever the class.
        """
        name = self.classes[turn % len(self.classes)]
        if not self.images[name]:
            name = max(self.classes, key=lambda other: len(self.images[other]))
        queue = self.images[name]
        place, least = 0, (queue[0][0], self.taken[queue[0][1]])
        for position, (late, patient, _) in enumerate(queue):
            if least == self._least.get(name):  # it only grows, so nothing below follows
                break
            if (late, self.taken[patient]) < least:
                place, least = position, (late, self.taken[patient])
        self._least[name] = least
        _, patient, index = queue.pop(place)
        self.taken[patient] += 1
        return index


def _queues(indices: Sequence[int], groups: Sequence[str], strata: Sequence[int], draw: torch.Generator) -> _Queues:
    """Half of the patients of each class first, patients taking turns inside a half; all by seed."""
    by_patient: dict[str, list[int]] = defaultdict(list)
    for index in _shuffled(indices, draw):
        by_patient[groups[index]].append(index)
    by_class: dict[int, list[str]] = defaultdict(list)
    for patient, images in by_patient.items():
        by_class[Counter(strata[index] for index in images).most_common(1)[0][0]].append(patient)
    rank = {
        patient: (position >= (len(patients) + 1) // 2, position)
        for patients in by_class.values()
        for position, patient in enumerate(patients)
    }
    order: dict[int, list[tuple[bool, int, int, int]]] = defaultdict(list)
    for patient, images in by_patient.items():
        late, position = rank[patient]
        turns: Counter[int] = Counter()
        for index in images:
            order[strata[index]].append((late, turns[strata[index]], position, index))
            turns[strata[index]] += 1
    classes = _shuffled(sorted(order), draw)
    queues = {name: [(late, groups[index], index) for late, *_, index in sorted(order[name])] for name in classes}
    return _Queues(classes, queues)


def _draw_victims(
    dataset: Dataset, groups: Sequence[str], strata: Sequence[int], victims: int, size: int, draw: torch.Generator
) -> tuple[tuple[int, ...], ...]:
    needed = victims * size
    if needed > len(dataset):
        raise DataError(
            f"data '{dataset.name}' has {len(dataset)} images and {needed} are needed for {victims} victims with "
            f"{size} images each; ask for fewer victims or a smaller batch, or give more images"
        )
    return _dealt_out(_queues(range(len(dataset)), groups, strata, draw), victims, size)


def _dealt_out(queues: _Queues, clients: int, size: int) -> tuple[tuple[int, ...], ...]:
    """So many images for each client, classes taking turns over clients and over the images of a client."""
    rows = [[queues.take(client + turn) for client in range(clients)] for turn in range(size)]
    return tuple(tuple(row[client] for row in rows) for client in range(clients))


def _draw_bystanders(
    dataset: Dataset,
    groups: Sequence[str],
    strata: Sequence[int],
    used: Sequence[int],
    bystanders: int,
    size: int,
    draw: torch.Generator,
) -> tuple[tuple[int, ...], ...]:
    needed = bystanders * size
    taken = {groups[index] for index in used}
    free = [index for index in range(len(dataset)) if groups[index] not in taken]
    if needed > len(free):
        raise DataError(
            f"data '{dataset.name}' has {len(dataset)} images; {len(free)} of other patients than the victims' are "
            f"left and {needed} are needed for {bystanders} bystanders with {size} images each; ask for fewer clients or "
            "victims or a smaller batch, or give more images"
        )
    return _dealt_out(_queues(free, groups, strata, draw), bystanders, size) if needed else ((),) * bystanders


def _resembling(
    dataset: Dataset,
    candidates: Sequence[int],
    used: Sequence[int],
    other_victims: Tensor | Sequence[Tensor] | None,
    threshold: float,
) -> list[bool]:
    """Which candidates nearly repeat an image of a victim or bystander, of this data set or of others."""
    others = [other_victims] if isinstance(other_victims, Tensor) else list(other_victims or ())
    images = dataset.images[list(candidates)]
    repeated = near_duplicates_of(images, dataset.images[list(used)], threshold)
    for reference in others:
        repeated |= near_duplicates_of(images, reference, threshold)
    return [bool(flag) for flag in repeated]


def _deal(
    pool: Sequence[int],
    groups: Sequence[str],
    strata: Sequence[int],
    parts: tuple[float, float, float],
    draw: torch.Generator,
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Patient by patient to the part that lacks most of its share, in the patient's classes and in all.

    Where patients run out, parts that are still empty are served first: null, then auxiliary, then training.
    """
    shares = [part / sum(parts) for part in parts]
    by_patient: dict[str, list[int]] = defaultdict(list)
    for index in _shuffled(pool, draw):
        by_patient[groups[index]].append(index)
    dealt: list[list[int]] = [[], [], []]
    totals: Counter[int] = Counter()
    in_class: list[Counter[int]] = [Counter(), Counter(), Counter()]
    done = 0
    for position, images in enumerate(by_patient.values()):
        classes = Counter(strata[index] for index in images)
        totals.update(classes)
        done += len(images)
        empty = [part for part in (2, 1, 0) if shares[part] > 0 and not dealt[part]]
        if len(by_patient) - position <= len(empty):
            part = empty[0]
        else:
            lacks = [
                shares[part] * (done + sum(totals[name] for name in classes))
                - (len(dealt[part]) + sum(in_class[part][name] for name in classes))
                for part in range(3)
            ]
            part = max((part for part in range(3) if shares[part] > 0), key=lacks.__getitem__)
        dealt[part] += images
        in_class[part].update(classes)
    training, auxiliary, null = (tuple(sorted(part)) for part in dealt)
    return training, auxiliary, null


def _with_notes(result: Split, dataset: Dataset, threshold: float) -> Split:
    notes: list[str] = []
    known = sum(patient is not None for patient in dataset.patients)
    if known == 0:
        notes.append("Patients are not known: images of one patient can be on both sides of the split.")
    elif known < len(dataset):
        notes.append(f"The patient of {len(dataset) - known} of {len(dataset)} images is not known.")
    notes += _dependence_notes(result.victims, dataset, threshold)
    for name, part in (("training", result.training), ("auxiliary", result.auxiliary), ("null", result.null)):
        if not part:
            notes.append(f"The pool has no {name} images: too few images of other patients are left.")
    return replace(result, notes=tuple(notes))


def _dependence_notes(victims: Sequence[Sequence[int]], dataset: Dataset, threshold: float) -> list[str]:
    """Why intervals over these victims are too narrow, if they are."""
    notes: list[str] = []
    patients = {dataset.patients[index] for victim in victims for index in victim}
    if None not in patients and 0 < len(patients) < len(victims):
        notes.append(
            f"The {len(victims)} victims come from {len(patients)} patient{'s' * (len(patients) > 1)}: they are not "
            "independent, and intervals over them are too narrow."
        )
    similar = 0
    for number, victim in enumerate(victims):
        others = [index for other, images in enumerate(victims) if other != number for index in images]
        repeats = near_duplicates_of(dataset.images[list(victim)], dataset.images[others], threshold)
        similar += bool(repeats.any())
    if similar:
        notes.append(f"{similar} of {len(victims)} victims have an image that nearly repeats one of another victim.")
    return notes
