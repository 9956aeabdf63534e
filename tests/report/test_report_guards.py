"""The report's words on guards: verdicts counted by client, beside what came back without them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from medpfl.audit import parse_spec, run_audit
from medpfl.report import write_report
from medpfl.report.guards import beside_pictures, guard_outcomes, others, recovered
from medpfl.report.views import Cell, ImageResult, Measured

GATE = "leakage_gate: crafted (3 of 4 images come back)"


def axes(guard: str) -> dict[str, str]:
    given = dict.fromkeys(("dataset", "model", "recipe", "threat_model", "channel", "defense"), "x")
    return {**given, "guard": guard, "attack": "medleak"}


def image(victim: int, client: int, position: int, status: str, verdict: str = "", withheld: float = 0) -> ImageResult:
    return ImageResult(
        f"c/v{victim}", "c", "0", str(victim), str(client), position, "item", status, "",
        success=status == "done", verdict=verdict, verdict_reason=verdict and GATE, others_withheld=withheld,
    )  # fmt: skip


BARE = Cell("bare", axes("none"), done=4, asr=Measured(0.75), recovered=Measured(0.5))


def test_clients_are_counted_once_whatever_the_number_of_their_images() -> None:
    rows = tuple(image(victim, 0, position, "blocked", "crafted", 1) for victim in (0, 1) for position in (0, 1))
    channel = {"channel": {"name": "secure_sum", "clients": 4}}
    cell = Cell("gated", axes("leakage_gate"), params=channel, blocked=4, results=rows)
    (outcome,) = guard_outcomes([BARE, cell])
    assert (outcome.clients, outcome.withheld, outcome.verdicts) == (2, 2, "2 crafted")
    assert others(outcome) == "2 of 6 updates"  # one of three bystanders in each of two rounds
    assert outcome.reason == GATE
    assert recovered(outcome.cell) == "nothing, all withheld"
    assert recovered(outcome.unguarded) == "75% reconstructed, 50% above 30 dB"


def test_where_all_clients_are_scored_none_is_counted_twice() -> None:
    rows = (
        image(0, 0, 0, "blocked", "crafted", 1),
        image(0, 1, 1, "done", "passed", 2),
        image(0, 2, 2, "blocked", "leaks", 1),
    )
    channel = {"channel": {"name": "secure_sum", "clients": 3, "score": "all"}}
    (outcome,) = guard_outcomes([Cell("gated", axes("leakage_gate"), params=channel, done=1, blocked=2, results=rows)])
    assert (outcome.clients, outcome.withheld, outcome.verdicts) == (3, 2, "1 crafted, 1 leaks, 1 passed")
    assert others(outcome) == ""
    assert outcome.unguarded is None


def test_pictures_without_a_guard_say_what_one_would_have_done() -> None:
    blocked = (image(0, 0, 0, "blocked", "crafted"),)
    passed = (replace(image(0, 0, 0, "done", "passed"), verdict_reason="norm_bound: passed"),)
    gated = Cell("gated", axes("leakage_gate"), blocked=1, results=blocked)
    bounded = Cell("bounded", axes("norm_bound"), done=1, results=passed)
    found = beside_pictures([BARE, gated, bounded])
    assert found["bounded"]["0", "0", "0"] == ["Guard norm_bound: passed"]
    assert found["bare"]["0", "0", "0"] == [
        f"The guard leakage_gate would have withheld this update. {GATE}",
        "The guard norm_bound would have let it pass. norm_bound: passed",
    ]
    assert "gated" not in found


def test_a_report_names_verdicts_and_shows_no_picture_of_a_withheld_round(tmp_path: Path) -> None:
    plain = {
        "data": [{"name": "films", "reader": "phantom", "count": 120, "resolution": 24, "size": 16, "victims": 1}],
        "models": ["lenet_idlg"],
        "recipes": [{"update": "weights", "batch_size": 4, "learning_rate": 0.1}],
        "threat_models": [
            {
                "name": "malicious_server",
                "can": ["parameters", "architecture", "inconsistent_models"],
                "knows": ["auxiliary"],
            }
        ],
        "guards": ["none", "leakage_gate"],
        "attacks": [{"name": "medleak", "bins": 64, "scale": 1e-4}],
    }
    run_audit(parse_spec(plain, tmp_path), tmp_path / "out", workers=0)
    text = write_report(tmp_path / "out").read_text()
    assert 'id="guards"' in text
    assert "1 of 1 update<" in text
    assert "would have withheld this update. leakage_gate: crafted" in text
    assert text.count('class="pair"') == 4  # of the unguarded cell's four images only
