"""The diagnosis in the report: sentences that say what protects, and cells that stand nowhere else."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from medpfl.report import write_report
from medpfl.report.diagnosis import diagnoses, pictured, scale
from medpfl.report.diagnosis_wording import brief, facts, headline, in_words, paragraph
from medpfl.report.loading import load_audit

MakeAudit = Callable[..., Path]
MakeSpec = Callable[..., Any]


def effect(change: str, cell: str, psnr: tuple[float, float, float], before: int, after: int, **more: Any) -> Any:
    """An entry of a change on six images of six victims; `psnr` is difference, low and high."""
    return {
        "change": change, "cell": cell, "status": "done", "reason": None, "oracle": "", "victims": 6, "images": 6,
        "success": {"before": before / 6, "after": after / 6, "difference": (after - before) / 6, "low": 0, "high": 1},
        "psnr": {"before": 10.0, "after": 10.0 + psnr[0], "difference": psnr[0], "low": psnr[1], "high": psnr[2]},
        "ssim": {"before": 0.1, "after": 0.9, "difference": 0.8, "low": 0.7, "high": 0.9},
        **more,
    }  # fmt: skip


@pytest.fixture
def diagnosed(make_audit: MakeAudit, make_spec: MakeSpec) -> Callable[..., Path]:
    """An audit of one cell, and one that exists for its diagnosis; the verdict is given."""

    def make(verdict: str, limit: str | None, effects: list[Any] | None = None) -> Path:
        base = make_spec(model="resnet18_cifar", attack="gradinv", noise=0.5)
        extra = make_spec(model="resnet18_cifar~1a2b3c", attack="gradinv", noise=0.001)
        changes = effects if effects is not None else [
            effect("untrained", extra.id, (9.1, 6.0, 12.0), 0, 5),
            effect("labels_given", "gone", (0.2, -1.0, 1.5), 0, 0, oracle="labels"),
            effect("batch_norm_eval", "gone", (-3.0, -4.0, -2.0), 0, 0),
            {"change": "no_defense", "cell": "gone", "status": "refused", "reason": "not <b>possible</b>", "oracle": ""},
        ]  # fmt: skip
        entry = {
            "cell": base.id, "verdict": verdict, "limit": limit, "label_accuracy": 0.5,
            "notes": [{"text": "the model is not smooth", "cases": 6}], "stop_reasons": [{"text": "budget", "cases": 6}],
            "changes": changes,
        }  # fmt: skip
        folder = make_audit([base, extra], summary={"diagnosis": [entry]})
        for name in ("cells.csv", "results.csv"):
            table = pd.read_csv(folder / name, dtype=str)
            is_extra = table["cell"] == extra.id
            table["diagnosis_of"] = is_extra.map({True: base.id, False: ""})
            table["change"] = is_extra.map({True: "untrained", False: ""})
            table.to_csv(folder / name, index=False)
        return folder

    return make


def test_its_cells_are_in_no_other_section(diagnosed: Callable[..., Path]) -> None:
    folder = diagnosed("limited", "untrained")
    audit = load_audit(folder)
    assert [cell.axes["model"] for cell in audit.cells] == ["resnet18_cifar"]
    assert [cell.axes["model"] for cell in audit.sweep] == ["resnet18_cifar~1a2b3c"]
    html = write_report(folder).read_text(encoding="utf-8")
    body = html.split("<body>")[1].split('id="reproduce"')[0]
    start, end = body.index('id="diagnosis"'), body.index('id="cells"')
    assert "~1a2b3c" not in body[:start] + body[end:]
    assert len(re.findall(r"<img", body[start:end])) == 9


def test_what_protects_is_said_with_its_figures(diagnosed: Callable[..., Path]) -> None:
    (found,) = diagnoses(load_audit(diagnosed("limited", "untrained")))
    text = paragraph(found)
    assert text.startswith(
        "What protects these images most today: the trained weights. Without it mean PSNR rises by 9.1 dB "
        "[6.0 to 12.0] and 5 of 6 images come back instead of 0."
    )
    assert text.endswith(
        "a protection that one setting removes is thin. Whoever sends the weights can send untrained ones."
    )
    assert brief(found) == "the trained weights: without, PSNR +9.1 dB [6.0 to 12.0], 0 -> 5 of 6 images"
    words = {one.change: in_words(one) for one in found.effects}
    assert words["labels_given"].startswith("No clear effect by itself.")
    assert "oracle" in words["labels_given"]
    assert words["batch_norm_eval"] == "Does not protect: without it the attack does worse."
    assert words["no_defense"] == "Not possible: not <b>possible</b>"
    told = " ".join(facts(found))
    for expected in (
        "50%",
        "the model is not smooth (6 cases)",
        "budget (6 cases)",
        "the same 6 victims",
        "one in twenty",
    ):
        assert expected in told
    assert scale([found]) == 12.0
    assert [(a.victim, b.victim) for a, b in pictured(found)] == [(str(i), str(i)) for i in range(3)]


@pytest.mark.parametrize(
    ("verdict", "limit", "said", "short"),
    [
        ("open", None, "Nothing limits this attack", "Nothing: the attack succeeds as it is"),
        ("unexplained", None, "does not make|None of the changes", "None of the conditions that were tried"),
        ("unsure", None, "6 victims are too few", "Cannot be told"),
        ("bare", None, "no condition to take away", "No condition is left to take away"),
    ],
)
def test_other_verdicts(verdict: str, limit: str | None, said: str, short: str, diagnosed: Callable[..., Path]) -> None:
    (found,) = diagnoses(load_audit(diagnosed(verdict, limit, [] if verdict == "bare" else None)))
    assert re.search(said, paragraph(found))
    assert brief(found) == headline(found) == short


def test_protections_that_hide_each_other(diagnosed: Callable[..., Path]) -> None:
    small = effect("untrained", "gone", (0.1, -1.0, 1.0), 0, 0)
    folder = diagnosed("together", "all", [small, effect("all", "gone", (20.0, 15.0, 25.0), 0, 6)])
    (found,) = diagnoses(load_audit(folder))
    assert "hide each other" in paragraph(found)
    assert "6 of 6 images come back instead of 0" in paragraph(found)
    partly = diagnosed(
        "limited",
        "untrained",
        [effect("untrained", "gone", (3.0, 1.0, 5.0), 0, 0), effect("all", "gone", (20.0, 15.0, 25.0), 0, 6)],
    )
    (found,) = diagnoses(load_audit(partly))
    assert "something else covers them too" in paragraph(found)
    assert "With all conditions taken away at once, 6 of 6 images come back instead of 0." in paragraph(found)


def test_the_section_is_escaped_and_without_images_on_demand(diagnosed: Callable[..., Path]) -> None:
    folder = diagnosed("limited", "untrained")
    html = write_report(folder, images=False).read_text(encoding="utf-8")
    assert "What protects these images today" in html
    assert "<b>possible</b>" not in html
    assert "<img" not in html


def test_a_summary_without_a_diagnosis_has_no_section(make_audit: MakeAudit, make_spec: MakeSpec) -> None:
    folder = make_audit([make_spec()], victims=2)
    assert 'id="diagnosis"' not in write_report(folder).read_text(encoding="utf-8")
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({**summary, "diagnosis": "none"}))
    assert diagnoses(load_audit(folder)) == ()
