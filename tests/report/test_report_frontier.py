"""The price of protection in the report: every point with its number, verdicts in words, and what stands beside."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from medpfl.audit.prices import Frontier, Priced, Span
from medpfl.report.frontier import how_trained, problems, sections
from medpfl.report.redaction import without_items
from medpfl.report.rendering import render
from medpfl.report.views import Audit

NOTHING = Span()


def priced(defense: str, family: str, leak: float, auc: float, **more: Any) -> Priced:
    return Priced(
        defense=defense,
        family=family,
        strength=None,
        attack="gradinv",
        leakage=Span(leak, leak - 0.1, leak + 0.1),
        knows=bool(family),
        informed=True,
        balanced_accuracy=Span(auc - 0.1, auc - 0.2, auc),
        auc=Span(auc, auc - 0.05, auc + 0.05),
        lost=Span(0.9 - auc, 0.8 - auc, 1.0 - auc),
        victims=8,
        failed=0,
        **more,
    )


def frontier(**changes: Any) -> Frontier:
    found = Frontier(
        dataset="brain",
        model="net",
        recipe="gradient-b1",
        channel="plain",
        adversary="honest_server",
        column="ssim_mean",
        limit="ssim_mean <= 0.4",
        settings=(
            priced("none", "", 0.95, 0.9, acceptable=False),
            priced("weak", "laplace", 0.5, 0.85, acceptable=False),
            priced("clipped", "dp_sgd", 0.6, 0.8, epsilon=3.25, acceptable=False, dominated_by="weak"),
            priced("strong", "laplace", 0.2, 0.7, acceptable=True, bytes_sent=123456.0),
        ),
        recommended="strong",
        advice="The cheapest is <strong>.",
        alone=Span(0.65, 0.6, 0.7),
        guessing=0.5,
        notes=("Client 2 of 4 holds images of one class only ('glioma').",),
    )
    return replace(found, **changes)


def utility(**changes: Any) -> dict[str, Any]:
    span = {"mean": 0.9, "low": 0.8, "high": 1.0}
    entry = {
        "dataset": "brain",
        "model": "net",
        "defense": "none",
        "clients": [11, 12],
        "held_out": 20,
        "refusal": None,
        "broken_down": 0,
        "undefended": {"auc": span},
        "recipe_as_trained": {
            "update": "gradient",
            "epochs": 1,
            "batch_size": 16,
            "optimizer": "adam",
            "learning_rate": 0.001,
        },
        **changes,
    }
    how = {"rounds": 20, "seeds": 3, "partition": "iid", "concentration": 0.5}
    return {"how": how, "runs": 3, "done": 3, "failed": 0, "reasons": [], "settings": [entry]}


def test_every_setting_has_its_number_in_figure_and_table(tmp_path: Path) -> None:
    page = render(Audit("a", frontiers=(frontier(),), utility=utility()), tmp_path, images=False)
    figure = page[page.index('aria-label="brain: mean SSIM') :]
    figure = figure[: figure.index("</svg>")]
    for number in range(1, 5):
        assert re.search(rf">\s*{number}\s*</text>", figure)
        assert f"{number}. " in page
    assert "clients alone" in figure
    assert "guessing" in figure
    assert "The cheapest is &lt;strong&gt;." in page


def test_the_table_says_what_holds_and_what_is_dominated() -> None:
    (section,) = sections(Audit("a", frontiers=(frontier(),), utility=utility()))
    none, weak, clipped, strong = section.lines
    assert (none.defense, none.lost) == ("no defense", "–")
    assert weak.verdict == "not surely below ssim_mean <= 0.4"
    assert clipped.verdict.endswith("dominated by weak")
    assert (strong.verdict, strong.recommended) == ("recommended", True)
    assert (strong.lost, strong.lost_interval) == ("−0.200", "−0.300 to −0.100")
    assert (clipped.epsilon, none.epsilon, strong.bytes_sent) == ("3.25", "–", "123,456")
    assert section.has_epsilon
    assert weak.style == strong.style
    assert weak.style is not None
    assert clipped.style is not None
    assert weak.style.color != clipped.style.color
    assert weak.style.marker != clipped.style.marker  # told apart without colors


def test_settings_without_utility_or_epsilon_leave_these_out() -> None:
    bare = replace(frontier().settings[0], auc=NOTHING, balanced_accuracy=NOTHING, lost=NOTHING)
    (section,) = sections(Audit("a", frontiers=(frontier(settings=(bare,), limit=None, recommended=None),)))
    assert not section.has_epsilon
    assert not section.has_bytes
    assert section.lines[0].auc == "–"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"refusal": "this model segments"}, "not measured, because this model segments"),
        ({"broken_down": 2}, "2 federations broke down"),
        ({"undefended": {"auc": {"mean": 0.55, "low": 0.45, "high": 0.6}}}, "learnt nothing for sure"),
    ],
)
def test_what_spoils_the_numbers_is_said(changes: dict[str, Any], expected: str) -> None:
    (said,) = problems(utility(**changes))
    assert expected in said
    assert problems(utility()) == ()
    assert "1 of 3 federations" in problems({**utility(), "done": 1})[0]


def test_how_the_federation_was_trained_is_told() -> None:
    said = how_trained(utility())
    for part in ("3 federations", "20 rounds", "2 clients", "11 to 12", "batches of 16", "adam", "20 held-out images"):
        assert part in said


def test_a_shared_report_keeps_the_prices() -> None:
    audit = without_items(Audit("a", frontiers=(frontier(),), utility=utility()))
    assert sections(audit)[0].lines[3].recommended
