"""Every registered defense is attacked, in one audit, by the attack that knows it."""

from __future__ import annotations

import csv
from typing import Any

import pytest

from medpfl.attacks import ATTACKS
from medpfl.audit.runner import run_audit
from medpfl.audit.spec import parse_spec
from medpfl.audit.validation import field_names
from medpfl.core.mechanisms import Unchanged
from medpfl.defenses import DEFENSES

DATA = {"name": "films", "reader": "phantom", "kind": "chest", "count": 40, "size": 16, "victims": 1}

BUDGETS = {"iterations": 5, "restarts": 1}
"""Settings that make any attack small, where it has them."""

KNOWN = [entry.name for entry in DEFENSES if entry.item().mechanism() != Unchanged()]


MIXING = ("mixup", "instahide")
"""Defenses that need more than one image in a batch."""


def small(name: str, **more: Any) -> dict[str, Any]:
    """The attack that a defense names, with a tiny budget, against that defense only."""
    named = dict(DEFENSES[name].item.adaptive_attack)
    keys = field_names(ATTACKS[named["name"]].item)
    budget = {key: value for key, value in BUDGETS.items() if key in keys}
    return {**named, **budget, **more, "label": f"against-{name}", "only": {"defense": [name]}}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, str]]]:
    """Rows of `cells.csv` and of `results.csv`."""
    base = tmp_path_factory.mktemp("adaptive")
    spec = parse_spec(
        {
            "data": [DATA],
            "models": [{"name": "lenet_dlg"}],
            "threat_models": [{"name": "honest_server", "knows": ["defense", "labels", "auxiliary"]}],
            "recipes": [
                {"update": "gradient", "only": {"defense": [name for name in KNOWN if name not in MIXING]}},
                {"update": "gradient", "batch_size": 2, "only": {"defense": list(MIXING)}},
            ],
            "defenses": [{"name": name} for name in KNOWN],
            "attacks": [small(name) for name in KNOWN],
        },
        base,
    )
    run_audit(spec, base / "out", workers=0)
    tables = {}
    for table in ("cells", "results"):
        with (base / "out" / f"{table}.csv").open() as handle:
            tables[table] = list(csv.DictReader(handle))
    return tables


@pytest.mark.parametrize("name", KNOWN)
def test_the_attack_that_knows_a_defense_runs_against_it(name: str, found: dict[str, list[dict[str, str]]]) -> None:
    (cell,) = [row for row in found["cells"] if row["defense"] == name]
    assert (cell["status"], cell["reason"]) == ("done", "")
    row = next(row for row in found["results"] if row["defense"] == name)
    assert (row["status"], row["adaptive"]) == ("done", "true")
    assert float(row["gradient_evaluations"]) > 0
