"""The noisy releases of a guarantee over rounds, brought together for accountants and bounds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from medpfl.core.guarantees import Release


def over_rounds(releases: Sequence[Release], rounds: int) -> tuple[Release, ...]:
    """What so many rounds release, each at its own noise where that decays.

    >>> over_rounds([Release("gaussian", 4.0, count=2, decay=0.5)], 2)
    (Release(kind='gaussian', scale=4.0, sampling_rate=1.0, count=2, decay=1.0, floor=0.0), \
Release(kind='gaussian', scale=2.0, sampling_rate=1.0, count=2, decay=1.0, floor=0.0))
    """
    found: list[Release] = []
    for release in releases:
        if release.decay == 1.0:
            found.append(replace(release, scale=release.in_round(0), count=release.count * rounds, floor=0.0))
        else:
            scales = (release.in_round(number) for number in range(rounds))
            found += [replace(release, scale=scale, decay=1.0, floor=0.0) for scale in scales]
    return merged(found)


def merged(releases: Iterable[Release]) -> tuple[Release, ...]:
    """Equal releases counted together, those that reveal nothing left out. Their order does not matter.

    >>> merged([Release("gaussian", 1.0), Release("gaussian", 1.0, count=2), Release("laplace", 3.0, sampling_rate=0)])
    (Release(kind='gaussian', scale=1.0, sampling_rate=1.0, count=3, decay=1.0, floor=0.0),)
    """
    counts: dict[Release, int] = {}
    for release in releases:
        if release.count and release.sampling_rate > 0:
            one = replace(release, count=1)
            counts[one] = counts.get(one, 0) + release.count
    return tuple(replace(one, count=count) for one, count in counts.items())


def single_gaussian(releases: Sequence[Release]) -> float | None:
    """The noise multiplier of the one Gaussian release that says as much as all of these; None if there is none.

    Gaussian releases about every unit add up exactly: 1 / s^2 is the sum of their 1 / s_t^2.

    >>> single_gaussian([Release("gaussian", 4.0, count=16)])
    1.0
    """
    if not releases or any(one.kind != "gaussian" or one.sampling_rate < 1 for one in releases):
        return None
    if any(one.scale == 0 for one in releases):
        return 0.0
    return float(sum(one.count / one.scale**2 for one in releases) ** -0.5)
