"""How training images are divided among the clients of a federation."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Literal

import torch

from medpfl.core.errors import SpecError

Partition = Literal["iid", "site", "dirichlet"]
Places = tuple[tuple[int, ...], ...]
"""For each client the places of its images."""

MOST_DRAWS = 200
"""How often a Dirichlet partition is drawn again while a client is left without an image."""


def iid(groups: Sequence[str], classes: Sequence[int], clients: int, generator: torch.Generator) -> Places:
    """Clients alike: patients are dealt out so that each client has as many images of each class as can be.

    groups: the patient of each image (all images of a patient stay with one client). classes: the class of each image.
    """
    held: list[list[int]] = [[] for _ in range(clients)]
    counts: list[Counter[int]] = [Counter() for _ in range(clients)]
    for places in _shuffled_patients(groups, generator):
        main = _main_class(places, classes)
        client = min(range(clients), key=lambda number: (counts[number][main], len(held[number])))
        held[client] += places
        counts[client].update(classes[place] for place in places)
    return _sorted(held)


def dirichlet(
    groups: Sequence[str], classes: Sequence[int], clients: int, concentration: float, generator: torch.Generator
) -> Places:
    """Clients with different shares of each class, drawn from a symmetric Dirichlet distribution per class.

    A small concentration gives clients with few classes; a large one comes near to `iid`. Drawn again until each client
    has an image; raises SpecError where that does not come about. Hsu, Qi, Brown: Measuring the Effects of
    Non-Identical Data Distribution for Federated Visual Classification, 2019, section 3, by class instead of by client.
    """
    names = sorted(set(classes))
    for _ in range(MOST_DRAWS):
        shares = {name: _dirichlet_shares(clients, concentration, generator) for name in names}
        held: list[list[int]] = [[] for _ in range(clients)]
        counts: list[Counter[int]] = [Counter() for _ in range(clients)]
        dealt: Counter[int] = Counter()
        for places in _shuffled_patients(groups, generator):
            main = _main_class(places, classes)
            dealt[main] += len(places)
            lacks = [shares[main][number] * dealt[main] - counts[number][main] for number in range(clients)]
            client = max(range(clients), key=lacks.__getitem__)
            held[client] += places
            counts[client][main] += len(places)
        if all(held):
            return _sorted(held)
    raise SpecError(
        f"utility: {MOST_DRAWS} Dirichlet partitions of {len(groups)} images left one of {clients} clients without any; "
        f"raise concentration: {concentration:g}, or take fewer clients"
    )


def by_site(sites: Sequence[str | None]) -> Places:
    """One client per hospital. Raises SpecError where hospitals are not known, or there is only one."""
    known = {site for site in sites if site is not None}
    if not known:
        raise SpecError(
            "utility.partition: site divides images by hospital, but this data names none: give a CSV file with a `site` "
            "column or DICOM files with an institution, or use partition: iid or dirichlet"
        )
    if None in sites:
        missing = sum(site is None for site in sites)
        raise SpecError(
            f"utility.partition: site divides images by hospital, but {missing} of {len(sites)} training images name none; "
            "complete the column, or use partition: iid or dirichlet"
        )
    if len(known) == 1:
        raise SpecError(
            "utility.partition: site needs images of two hospitals or more, and all training images are of one; "
            "use partition: iid or dirichlet"
        )
    held: dict[str | None, list[int]] = defaultdict(list)
    for place, site in enumerate(sites):
        held[site].append(place)
    return _sorted([held[site] for site in sorted(known)])


def _shuffled_patients(groups: Sequence[str], generator: torch.Generator) -> list[list[int]]:
    """The places of each patient's images, patients in a random order."""
    by_patient: dict[str, list[int]] = defaultdict(list)
    for place, group in enumerate(groups):
        by_patient[group].append(place)
    patients = list(by_patient.values())
    return [patients[number] for number in torch.randperm(len(patients), generator=generator).tolist()]


def _main_class(places: Sequence[int], classes: Sequence[int]) -> int:
    """The class of most of a patient's images."""
    return Counter(classes[place] for place in places).most_common(1)[0][0]


def _dirichlet_shares(clients: int, concentration: float, generator: torch.Generator) -> list[float]:
    draws = torch._standard_gamma(torch.full((clients,), concentration, dtype=torch.float64), generator)
    total = float(draws.sum())
    return (draws / total).tolist() if total > 0 else [1.0 / clients] * clients


def _sorted(held: Sequence[Sequence[int]]) -> Places:
    return tuple(tuple(sorted(places)) for places in held)
