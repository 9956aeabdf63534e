"""The report's words on guarantees."""

from __future__ import annotations

import math
from dataclasses import replace

from medpfl.report.guaranteed import Guaranteed
from medpfl.report.guarantees import promises, reading, remarks, statement
from medpfl.report.views import Cell, Measured

AXES = {"dataset": "films", "model": "lenet_dlg", "recipe": "gradient-b1", "channel": "plain"}
FORMAL = Guaranteed(
    "gaussian, per image", 3.0, 1e-5, "image", "one image more or less", "client", 20, "closed form", 0.01, 100, 0.4,
    "trade-off function", 1, 0.05, 12.0, ("counters are sent without noise",),
)  # fmt: skip


def cell(defense: str, attack: str, asr: Measured, guaranteed: Guaranteed | None) -> Cell:
    axes = {**AXES, "defense": defense, "attack": attack}
    return Cell(f"{defense}/{attack}", axes, asr=asr, guaranteed=guaranteed)


def test_the_strongest_attack_stands_beside_the_bound() -> None:
    weak = cell("dp", "dlg", Measured(0.0, 0.0, 0.2), FORMAL)
    strong = cell("dp", "gradinv", Measured(0.5, 0.3, 0.7), FORMAL)
    bare = cell("none", "dlg", Measured(1.0), Guaranteed("no formal guarantee"))
    (found,) = promises([bare, weak, strong])
    assert found.strongest is strong
    assert found.broken  # 30% at least was measured where at most 5% may succeed
    assert any("Do not rely on that guarantee" in text for text in reading([found]))
    assert remarks([found]) == ("dp: counters are sent without noise",)


def test_rates_that_chance_explains_do_not_break_a_bound() -> None:
    (found,) = promises([cell("dp", "dlg", Measured(0.1, 0.02, 0.3), FORMAL)])
    assert not found.broken
    assert not any("Do not rely" in text for text in reading([found]))


def test_an_infinite_epsilon_is_said_and_no_guarantee_too() -> None:
    assert statement(replace(FORMAL, epsilon=math.inf)).startswith("ε = infinite")
    (found,) = promises([cell("laplace", "dlg", Measured(0.0), Guaranteed("no formal guarantee"))])
    assert reading([found]) == (
        "Without a formal guarantee only what was measured counts, and it counts for the audited attacks only.",
    )
    assert promises([cell("laplace", "dlg", Measured(0.0), None)]) == ()
