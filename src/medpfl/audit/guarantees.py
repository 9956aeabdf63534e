"""What each cell's defense guarantees by its construction, as columns of `cells.csv`: computed, not measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from medpfl.audit.grid import Cell
from medpfl.audit.guarantee_settings import GuaranteeSettings
from medpfl.audit.materials import Materials
from medpfl.audit.spec import Spec
from medpfl.audit.store import Store
from medpfl.audit.validation import as_plain
from medpfl.core.errors import MissingExtra
from medpfl.core.guarantees import Guarantee
from medpfl.metrics.privacy import ReconstructionBound, bound, bound_curve, prior_success, state
from medpfl.metrics.privacy.no_prior import read_out_variance
from medpfl.metrics.privacy.releases import over_rounds

NO_GUARANTEE = "no formal guarantee"
"""What the column `guarantee` says where a defense has none."""

PRIORS = (0.001, 0.01, 0.1, 0.5)
"""Priors for which `reconstruction_curve` has the bound."""

GUARANTEE_COLUMNS = (
    "guarantee", "epsilon", "delta", "privacy_unit", "neighbors", "noise_added_by", "composed_rounds", "accountant",
    "prior_success", "prior_images", "reconstruction_bound", "reconstruction_theorem", "reconstruction_curve",
    "observed_rounds", "observed_bound", "no_prior_psnr", "guarantee_remarks",
)  # fmt: skip
"""Columns of `cells.csv`, all empty but the first where there is no guarantee.

guarantee: the noise, per what; or that there is none. epsilon, delta: over `composed_rounds`, for the unit and neighbor
relation that are named, by `accountant`. prior_success: how often the best blind guess succeeds, as estimated from
`prior_images` images. reconstruction_bound: how often any attacker succeeds at most who has no better prior and knows
all but one unit, over `composed_rounds`; reconstruction_curve: the same for other priors, as JSON; observed_bound: over the `observed_rounds` that the audited attacker saw,
empty where the server adds the noise, because the attacker stands before it.
no_prior_psnr: PSNR in dB of the best read-out in `observed_rounds` by an attacker to whom all images are alike.
"""


def keep_guarantees(store: Store, spec: Spec, cells: Sequence[Cell], materials: Materials) -> None:
    """Stores what the defenses of these cells guarantee; computed anew for other settings or new cells only."""
    settings = spec.guarantee or GuaranteeSettings()
    kept = store.get("guarantees") or {"settings": None, "cells": {}}
    if kept["settings"] != as_plain(settings) or any(cell.id not in kept["cells"] for cell in cells):
        columns = guarantee_columns(settings, cells, materials, asked_for=spec.guarantee is not None)
        store.set("guarantees", {"settings": as_plain(settings), "cells": columns})


def guarantee_columns(
    settings: GuaranteeSettings, cells: Sequence[Cell], materials: Materials, *, asked_for: bool
) -> dict[str, dict[str, Any]]:
    """Cell id -> its columns. asked_for: whether the spec has the key; then a missing accountant is an error.

    Raises MissingExtra in that case; otherwise the column `accountant` says what to install.
    """
    found: dict[str, dict[str, Any]] = {}
    for cell in cells:
        recipe = cell.recipe.recipe
        guarantee = cell.defense.defense.guarantee(recipe, recipe.private_images)
        if guarantee is None:
            found[cell.id] = {"guarantee": NO_GUARANTEE}
            continue
        images = _prior_images(cell, materials)
        facts = Facts(
            images=images,
            prior=_prior(cell, images, materials),
            weights=materials.initial_model(cell, materials.spec.seeds[0], 0).parameter_count,
            observed=recipe.rounds,
        )
        key = ("guarantee", cell.dataset.id, cell.model.id, cell.recipe.id, cell.defense.id)
        found[cell.id] = materials.once(key, partial(_columns, guarantee, settings, facts, asked_for))
    return found


@dataclass(frozen=True)
class Facts:
    """What bounds depend on beside the guarantee: images of others, how often a blind guess succeeds on them (None
    without any), how many numbers are sent, and in how many rounds the audited attacker sees them."""

    images: Tensor
    prior: float | None
    weights: int
    observed: int


def _prior(cell: Cell, images: Tensor, materials: Materials) -> float | None:
    """The success of the best blind guess; None without images to estimate it from."""
    threshold = materials.spec.success_threshold
    if not len(images):
        return None
    return materials.once(("prior success", cell.dataset.id), partial(prior_success, images, threshold))


def _columns(guarantee: Guarantee, settings: GuaranteeSettings, facts: Facts, asked_for: bool) -> dict[str, Any]:
    kinds = " and ".join(dict.fromkeys(release.kind.replace("_", " ") for release in guarantee.releases)) or "nothing"
    rounds = max(settings.rounds, facts.observed)
    columns: dict[str, Any] = {
        "guarantee": f"{kinds}, per {guarantee.unit}",
        "delta": settings.delta,
        "privacy_unit": guarantee.unit,
        "noise_added_by": guarantee.added_by,
        "composed_rounds": rounds,
        "prior_success": facts.prior,
        "prior_images": len(facts.images),
        "observed_rounds": facts.observed,
        "guarantee_remarks": "; ".join(guarantee.remarks),
    }
    try:
        statement = state(
            guarantee, rounds=rounds, delta=settings.delta, images_per_patient=settings.images_per_patient
        )
        over_all, observed = (_bound(guarantee, settings, facts, over) for over in (rounds, facts.observed))
        curve = bound_curve(
            guarantee,
            rounds=rounds,
            priors=PRIORS,
            images_per_patient=settings.images_per_patient,
            weights=facts.weights,
        )
    except MissingExtra as error:
        if asked_for:
            raise
        return {**columns, "accountant": str(error)}
    columns |= {
        "epsilon": statement.epsilon,
        "privacy_unit": statement.unit,
        "neighbors": statement.neighbors,
        "accountant": statement.accountant,
        "reconstruction_bound": None if over_all is None else over_all.success,
        "reconstruction_theorem": None if over_all is None else over_all.theorem,
        "reconstruction_curve": {f"{prior:g}": success for prior, success in curve.items()},
    }
    if guarantee.unit == "weight":
        together = f"over all {facts.weights:,} weights the epsilons add up to {statement.epsilon * facts.weights:.3g}, which is what an image may lose"
        columns["guarantee_remarks"] = "; ".join((*guarantee.remarks, together))
    if guarantee.added_by == "server":  # the audited attacker stands before the noise
        return columns
    return {
        **columns,
        "observed_bound": None if observed is None else observed.success,
        "no_prior_psnr": _no_prior_psnr(guarantee, facts),
    }


def _bound(guarantee: Guarantee, settings: GuaranteeSettings, facts: Facts, rounds: int) -> ReconstructionBound | None:
    if facts.prior is None:
        return None
    patient = settings.images_per_patient
    return bound(guarantee, rounds=rounds, prior_success=facts.prior, images_per_patient=patient, weights=facts.weights)


def _no_prior_psnr(guarantee: Guarantee, facts: Facts) -> float | None:
    """Of the best read-out of an image of mean norm."""
    if not len(facts.images):
        return None
    squared = float(facts.images.double().square().flatten(1).sum(dim=1).mean())
    variance = read_out_variance(over_rounds(guarantee.releases, facts.observed), squared)
    return None if variance is None else -10 * math.log10(max(variance, 1e-10))


def _prior_images(cell: Cell, materials: Materials) -> Tensor:
    """What an adversary may own: the pool's auxiliary part, or its null part where that is empty."""
    pool = materials.pool(cell.dataset, materials.spec.seeds[0])
    return pool.dataset.images[list(pool.split.auxiliary or pool.split.null)]
