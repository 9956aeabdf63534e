"""Several mechanisms one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from medpfl.attacks.matching.likelihoods.base import (
    Likelihood,
    NotCombined,
    View,
    chained,
    even,
    likelihood,
    likelihood_of,
)
from medpfl.attacks.matching.objectives import Transform, where_observed
from medpfl.core.mechanisms import Composed, GaussianNoise, LaplaceNoise, Mechanism


@likelihood_of(Composed)
def composed(mechanism: Composed, view: View) -> Likelihood:
    """The transforms in order, then the distance of the last random part.

    Normal noise after normal noise is noise of the summed variance. Entries that a later part set to zero are left
    out. Raises NotCombined where a part transforms what an earlier one has already made random.
    """
    transforms: list[Transform] = []
    noise, random, notes = Likelihood(), None, list[str]()
    left = even(view, 1.0)
    for part in _with_summed_noise(_flat(mechanism.parts)):
        one = likelihood(part, view)
        notes += one.notes
        if one.survivors and noise.distance is not None and noise.evidence is None:
            noise = replace(noise, distance=where_observed(noise.distance))
            continue
        if one.transform is not None and random is not None:
            raise NotCombined(
                f"{type(part).__name__} comes after {type(random).__name__} and changes what was random once more, "
                "which has no likelihood here; put the noise last"
            )
        if one.transform is not None:
            transforms.append(one.transform)
        if one.distance is not None:
            left = left * (noise.tensor_weights(view.names) != 0)
            noise, random = one, part
        else:
            left = left * one.tensor_weights(view.names)
    weights = left * noise.tensor_weights(view.names)
    kept = replace(noise, transform=chained(transforms), weights=weights, notes=tuple(notes))
    return replace(kept, survivors=False)


def _flat(parts: Sequence[Mechanism]) -> list[Mechanism]:
    """Compositions inside compositions in one list."""
    return [one for part in parts for one in (_flat(part.parts) if isinstance(part, Composed) else [part])]


def _with_summed_noise(parts: Sequence[Mechanism]) -> list[Mechanism]:
    """Normal noise right after normal noise as one. Raises NotCombined for noise of two families."""
    found: list[Mechanism] = []
    for part in parts:
        before = found[-1] if found else None
        if isinstance(part, GaussianNoise) and isinstance(before, GaussianNoise):
            found[-1] = GaussianNoise((part.std**2 + before.std**2) ** 0.5)
        elif isinstance(part, LaplaceNoise | GaussianNoise) and isinstance(before, LaplaceNoise | GaussianNoise):
            raise NotCombined("the sum of Laplace noise and other noise has no likelihood here; use one kind of noise")
        else:
            found.append(part)
    return found
