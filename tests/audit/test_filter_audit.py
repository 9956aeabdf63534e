"""The audit of filters: right ones pass, ones that were seen broken in use are found out, with the right reason."""

from __future__ import annotations

import json
import math

import pytest

from medpfl.audit.filters import Claim, FilterAudit, as_plain, audit_filter, leakage, load_filter
from medpfl.audit.filters.behavior import behavior
from medpfl.audit.filters.noise import measure_noise
from medpfl.audit.filters.recognition import recognize
from medpfl.audit.filters.sensitivity import measure_sensitivity
from medpfl.core.errors import ModelError
from medpfl.core.mechanisms import Clipped, Composed, CutOff, GaussianNoise, Mechanism, Quantized, RandomK, Signs, TopK


def audited(name: str, claim: Claim = Claim(), **settings: object) -> FilterAudit:
    return audit_filter(load_filter(f"filters_under_audit:{name}", settings), claim, victims=0)


def problems(audit: FilterAudit) -> str:
    return " ".join(finding.sentence for finding in audit.findings if finding.level == "problem")


@pytest.mark.parametrize("name", ["ClipAndNoise", "MADE", "make_clip_and_noise"])
def test_clipping_with_the_right_noise_passes(name: str) -> None:
    audit = audited(name, Claim(epsilon=4.4))
    assert audit.passed, problems(audit)
    followed = audit.measured.following
    assert followed.multiplier == pytest.approx(1.0, rel=0.01)
    assert followed.once == pytest.approx(4.377, rel=0.01)
    assert followed.replaced == pytest.approx(9.98, rel=0.01)  # the same noise at twice the distance
    assert any("clipping: no update moved what is sent farther than 1" in words for words in audit.recognized)


def test_noise_from_the_operating_system_on_arrays() -> None:
    audit = audited("arrays", Claim(epsilon=4.6))
    assert audit.passed, problems(audit)
    assert audit.arrays == "numpy"
    assert not audit.measured.sensitivity.paired
    multiplier = audit.measured.following.multiplier
    assert multiplier is not None
    assert 0.95 < multiplier < 1.8  # what is uncertain is not held against the filter


def test_laplace_noise_in_units_of_absolute_values() -> None:
    audit = audited("clip_and_laplace", Claim(epsilon=0.55), scale=2.0)
    assert audit.passed, problems(audit)
    assert audit.measured.following.once == pytest.approx(0.5, rel=0.02)
    assert audit.measured.noise.kind == "laplace"


def test_rounds_cost_anew() -> None:
    assert audited("ClipAndNoise", Claim(epsilon=4.4, rounds=1)).passed
    audit = audited("ClipAndNoise", Claim(epsilon=4.4, rounds=20))
    assert not audit.passed
    assert "every round costs anew" in problems(audit)
    assert audit.measured.following.composed == pytest.approx(29.0, abs=1.0)  # one release with 1 / sqrt(20)


def test_percentile_clipping_sold_as_privacy() -> None:
    audit = audited("percentile_clipping", Claim(epsilon=1.0))
    assert "claimed epsilon of 1 does not follow" in problems(audit)
    assert "adds no noise" in problems(audit)
    assert audit.measured.behavior.left == pytest.approx(0.9, abs=0.02)


def test_a_filter_that_fails_open() -> None:
    audit = audited("percentile_clipping")
    opened = {(trial.setting, str(trial.value)) for trial in audit.measured.trials if trial.open}
    assert {("percentile", "-1.0"), ("percentile", "101.0"), ("percentile", "nan"), ("gamma", "0.0")} <= opened
    assert "It fails open: with gamma = -1 the update leaves as it came" in problems(audit)


def test_noise_that_a_counter_steers() -> None:
    audit = audited("counter_noise", Claim(epsilon=10.0))
    assert audit.measured.noise.follows_counter
    assert "counts batches steers the noise" in problems(audit)
    assert "claimed epsilon of 10 does not follow" in problems(audit)


def test_the_classical_formula_above_one() -> None:
    audit = audited("ClassicalGaussian", Claim(epsilon=10.0), epsilon=10.0)
    assert audit.measured.following.once == pytest.approx(10.39, rel=0.01)
    assert "too low" in problems(audit)
    assert "proved for epsilon below 1 only" in problems(audit)
    below = audited("ClassicalGaussian", Claim(epsilon=0.5), epsilon=0.5)
    assert below.passed, problems(below)


def test_noise_for_a_sensitivity_that_clipping_does_not_give() -> None:
    audit = audited("other_sensitivity", Claim(epsilon=10.0))
    assert audit.measured.following.once == pytest.approx(2.13e8, rel=0.01)
    assert audit.measured.following.replaced == pytest.approx(8.52e8, rel=0.01)
    assert "too low" in problems(audit)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("does_nothing", "not applied: every trained number left exactly as it came"),
        ("noise_without_clipping", "nothing bounds what one update changes"),
        ("SameNoise", "the same after every start"),
        ("BudgetThatEnds", "It stops: in call 30"),
        ("float32_only", "pass as they come: float64, float16, bfloat16"),
        ("returns_nothing", "returned nothing instead of a mapping"),
        ("raises", "RuntimeError: no such key: layer1.weight"),
    ],
)
def test_what_else_goes_wrong(name: str, said: str) -> None:
    assert said in problems(audited(name, Claim(epsilon=8.0)))


@pytest.mark.parametrize(
    ("name", "words", "mechanism"),
    [
        ("signs", "only signs are left", Signs(scaled=False)),
        ("largest_tenth", "90% of the entries put to zero, the smallest of all", TopK(0.1, "global")),
        ("random_fifth", "80% of the entries put to zero, drawn at random", RandomK(0.2, unbiased=True)),
        (
            "percentile_clipping",
            "entries cut off at 0.01; 10% of the entries put to zero before, the smallest of all",
            CutOff(0.01, sparse=True),
        ),
        ("seven_levels", "values are rounded to 7 levels on either side of zero", Quantized(7)),
        ("ClipAndNoise", "normal noise of standard deviation 1", Composed((Clipped(1.0), GaussianNoise(1.0)))),
    ],
)
def test_mechanisms_are_recognized(name: str, words: str, mechanism: Mechanism) -> None:
    subject = load_filter(f"filters_under_audit:{name}")
    noise = measure_noise(subject)
    found = recognize(subject, behavior(subject), noise, measure_sensitivity(subject, noise))
    assert words in found.words
    assert numbers(found.mechanism) == pytest.approx(numbers(mechanism), rel=0.06)
    assert kinds(found.mechanism) == kinds(mechanism)


def kinds(mechanism: Mechanism | None) -> list[str]:
    parts = mechanism.parts if isinstance(mechanism, Composed) else (mechanism,)
    return [type(part).__name__ for part in parts]


def numbers(mechanism: Mechanism | None) -> list[float]:
    parts = mechanism.parts if isinstance(mechanism, Composed) else (mechanism,)
    return [float(value) for part in parts for value in vars(part).values() if isinstance(value, int | float)]


@pytest.mark.parametrize("name", ["signs", "largest_tenth", "seven_levels"])
def test_compression_promises_nothing(name: str) -> None:
    audit = audited(name)
    assert audit.passed, problems(audit)
    assert "no formal guarantee" in audit.verdict


def test_attacks_behind_a_filter_and_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leakage, "NAIVE", {"cpl": {"iterations": 15}})
    monkeypatch.setattr(leakage, "ADAPTIVE", {**leakage.ADAPTIVE, "iterations": 20})
    audit = audit_filter(load_filter("filters_under_audit:ClipAndNoise", {"noise_multiplier": 5.0}), victims=1)
    rows = {(row.attack, row.filtered): row for row in audit.measured.leakage}
    assert rows["cpl", False].works
    assert not rows["cpl", True].works
    assert any(row.adaptive for row in audit.measured.leakage)


def test_the_audit_is_json() -> None:
    plain = as_plain(audited("other_sensitivity", Claim(epsilon=10.0)))
    assert json.loads(json.dumps(plain))["passed"] is False
    assert plain["measured"]["following"]["once"] > 1e8
    assert as_plain(audited("does_nothing"))["measured"]["sensitivity"]["distance"] == str(math.inf)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("nowhere", {}, "has no 'nowhere'"),
        ("ClipAndNoise", {"clop": 1.0}, "did you mean 'clip'"),
        ("ClipAndNoise", {"clip": -1.0}, "cannot be made: ValueError: clip must be positive"),
        ("MADE", {"clip": 1.0}, "takes no settings"),
        ("noised", {}, "needs 'update', 'std'"),
    ],
)
def test_what_cannot_be_loaded_is_an_error(name: str, settings: dict[str, object], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        load_filter(f"filters_under_audit:{name}", settings)
