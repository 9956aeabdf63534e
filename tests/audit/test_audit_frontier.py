"""What is dominated, what is recommended below a limit, and what is said where nothing is."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from medpfl.audit.frontier import as_plain, frontiers
from medpfl.audit.limits import parse_limit
from medpfl.audit.prices import Frontier
from medpfl.core.errors import SpecError

Points = dict[str, tuple[float, float, float]]
"""Defense -> success rate, upper end of its interval, AUC."""

POINTS: Points = {
    "none": (0.9, 1.0, 0.90),
    "weak": (0.5, 0.7, 0.88),
    "mild": (0.02, 0.08, 0.84),
    "strong": (0.0, 0.04, 0.80),
    "clumsy": (0.1, 0.2, 0.70),
}


def row(defense: str, rate: float, high: float, **more: Any) -> dict[str, Any]:
    params = {"name": "none"} if defense == "none" else {"name": "laplace", "scale": 1.0 - rate}
    return {
        "cell": f"{defense}-{more.get('attack', 'dlg')}",
        "dataset": "films",
        "model": "net",
        "recipe": "r",
        "channel": "plain",
        "threat_model": "informed",
        "threat_model_params": {"name": "honest_server"},
        "defense": defense,
        "defense_params": params,
        "guard": "none",
        "attack": "dlg",
        "oracle": "",
        "adaptive": defense != "none",
        "status": "done",
        "victims": 16,
        "failed": 0,
        "asr": rate,
        "asr_low": 0.0,
        "asr_high": high,
        "psnr_mean": 20.0,
        **more,
    }


def entry(cells: list[str], auc: float, **more: Any) -> dict[str, Any]:
    def span(value: float) -> dict[str, float]:
        return {"mean": value, "low": value - 0.05, "high": value + 0.05}

    return {
        "cells": cells,
        "refusal": None,
        "notes": [],
        "defended": {"auc": span(auc), "balanced_accuracy": span(auc)},
        "undefended": {"auc": span(0.9), "balanced_accuracy": span(0.9)},
        "alone": {"auc": span(0.6), "balanced_accuracy": span(0.6)},
        "majority": {"auc": 0.5, "balanced_accuracy": 0.5},
        "lost": {"auc": span(0.9 - auc), "balanced_accuracy": span(0.9 - auc)},
        **more,
    }


def frontier(limit: str | None, points: Points = POINTS, more: list[dict[str, Any]] | None = None) -> Frontier:
    rows = [row(name, rate, high) for name, (rate, high, _) in points.items()] + (more or [])
    settings = [
        entry([one["cell"] for one in rows if one["defense"] == name], auc) for name, (_, _, auc) in points.items()
    ]
    (found,) = frontiers(rows, {"settings": settings}, parse_limit(limit, "limit") if limit else None)
    return found


def test_the_upper_end_and_not_the_mean_must_hold_the_limit() -> None:
    found = frontier("asr <= 0.05")
    assert found.recommended == "strong"
    assert "0.100 below no defense" in found.advice
    assert {one.defense: one.acceptable for one in found.settings}["mild"] is False
    assert frontier("asr <= 0.08").recommended == "mild"


def test_a_defense_on_which_every_attack_failed_is_not_recommended_for_that() -> None:
    worse = {"gain_psnr": -9.0, "gain_psnr_low": -10.0, "gain_psnr_high": -8.0}
    rows = [row(name, rate, high, **(worse if name == "strong" else {})) for name, (rate, high, _) in POINTS.items()]
    settings = [
        entry([one["cell"] for one in rows if one["defense"] == name], auc) for name, (_, _, auc) in POINTS.items()
    ]
    (found,) = frontiers(rows, {"settings": settings}, parse_limit("asr <= 0.05", "limit"))
    assert found.recommended is None
    strong = found.named("strong")
    assert strong is not None
    assert (strong.outdone, strong.acceptable) == (True, None)
    assert "Nothing is known about strong" in found.advice
    clumsy = found.named("clumsy")
    assert clumsy is not None
    assert clumsy.dominated_by != "strong"


def test_without_a_limit_or_below_none_a_sentence_says_so() -> None:
    assert "--limit" in frontier(None).advice
    found = frontier("asr <= 0.01")
    assert found.recommended is None
    assert "No setting of this audit was found below asr <= 0.01" in found.advice
    assert "The nearest is strong with an upper end of 0.04" in found.advice


def test_how_many_victims_would_be_needed_is_the_binomial_bound() -> None:
    found = frontier("asr <= 0.05", {"none": (0.9, 1.0, 0.9), "strong": (0.0, 0.206, 0.8)})
    assert found.recommended is None
    assert "takes 72 such victims" in found.advice
    assert 1 - 0.025 ** (1 / 72) <= 0.05 < 1 - 0.025 ** (1 / 71)


def test_what_leaks_no_more_and_is_worth_no_less_dominates() -> None:
    dominated = {one.defense: one.dominated_by for one in frontier(None).settings}
    assert dominated == {"none": None, "weak": None, "mild": None, "strong": None, "clumsy": "mild"}


def test_the_strongest_attacker_counts_whether_it_knows_the_defense_or_not() -> None:
    naive = row("mild", 0.4, 0.6, attack="gradinv", adaptive=False, threat_model="naive", cell="mild-gradinv")
    found = frontier("asr <= 0.08", more=[naive])
    mild = found.named("mild")
    assert mild is not None
    assert (mild.attack, mild.leakage.value, mild.knows, mild.informed) == ("gradinv", 0.4, False, True)
    assert found.recommended == "strong"


def test_a_cheaper_defense_that_nobody_attacked_who_knows_it_is_named_and_not_recommended() -> None:
    rows = [row(name, rate, high, adaptive=name != "mild") for name, (rate, high, _) in POINTS.items()]
    settings = [entry([f"{name}-dlg"], auc) for name, (_, _, auc) in POINTS.items()]
    (found,) = frontiers(rows, {"settings": settings}, parse_limit("asr <= 0.1", "limit"))
    assert found.recommended == "strong"
    assert "mild would cost less, but no attacker who knows it was run" in found.advice
    (alone,) = frontiers(rows[2:3], {"settings": settings}, parse_limit("asr <= 0.1", "limit"))
    assert alone.recommended == "mild"
    assert "who does not know the defense" in alone.advice


def test_oracles_guards_refused_and_unfinished_cells_do_not_count() -> None:
    more = [
        row("strong", 1.0, 1.0, oracle="labels", attack="a", cell="strong-a"),
        row("strong", 1.0, 1.0, guard="vetting", attack="b", cell="strong-b"),
        row("strong", 1.0, 1.0, status="partial", attack="c", cell="strong-c"),
        row("strong", 1.0, 1.0, diagnosis_of="x", attack="d", cell="strong-d"),
    ]
    strong = frontier(None, more=more).named("strong")
    assert strong is not None
    assert strong.leakage.value == 0.0


def test_a_federation_that_learnt_nothing_prices_nothing() -> None:
    settings = [entry([f"{name}-dlg"], auc) for name, (_, _, auc) in POINTS.items()]
    for one in settings:
        one["undefended"]["auc"] = {"mean": 0.53, "low": 0.48, "high": 0.58}
    rows = [row(name, rate, high) for name, (rate, high, _) in POINTS.items()]
    (found,) = frontiers(rows, {"settings": settings}, parse_limit("asr <= 0.1", "limit"))
    assert found.recommended is None
    assert "not surely better than guessing" in found.advice


def test_rows_as_they_are_written_give_the_same() -> None:
    rows = [row(name, rate, high, epsilon=math.inf) for name, (rate, high, _) in POINTS.items()]
    texts = [
        {
            key: json.dumps(value) if isinstance(value, dict) else "true" if value is True else str(value)
            for key, value in one.items()
        }
        for one in rows
    ]
    utility = {"settings": [entry([f"{name}-dlg"], auc) for name, (_, _, auc) in POINTS.items()]}
    limit = parse_limit("asr <= 0.05", "limit")
    assert frontiers(texts, utility, limit) == frontiers(rows, utility, limit)
    plain = as_plain(frontiers(rows, utility, limit)[0])
    assert plain["settings"][0]["epsilon"] == "inf"
    json.dumps(plain, allow_nan=False)


def test_a_family_is_in_the_order_of_its_strength() -> None:
    found = [one for one in frontier(None).settings if one.family == "laplace"]
    assert [one.strength for one in found] == sorted(one.strength for one in found if one.strength is not None)


@pytest.mark.parametrize(
    ("text", "row_of", "expected"),
    [
        ("ssim <= 0.5", {"ssim_mean": 0.4, "ssim_low": 0.3, "ssim_high": 0.6}, False),
        ("psnr <= 20", {"psnr_mean": 15, "psnr_low": 14, "psnr_high": 16}, True),
        ("gain_psnr <= 0", {"gain_psnr": -1.0, "gain_psnr_low": -2.0, "gain_psnr_high": 0.5}, False),
        ("mse >= 0.05", {"mse_mean": 0.06, "mse_low": 0.04, "mse_high": 0.08}, False),
        ("psnr_median <= 20", {"psnr_median": 15}, True),
        ("asr <= 0.05", {"asr": 0.0, "asr_low": None, "asr_high": None}, None),
    ],
)
def test_limits_hold_surely_or_not(text: str, row_of: dict[str, Any], expected: bool | None) -> None:
    assert parse_limit(text, "limit").surely(row_of) is expected


def test_an_unknown_metric_in_a_limit_suggests_the_nearest() -> None:
    with pytest.raises(SpecError, match="did you mean 'gain_psnr'"):
        parse_limit("gain_pnsr <= 0", "--limit")
