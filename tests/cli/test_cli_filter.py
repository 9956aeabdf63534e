"""`medpfl filter` as a user runs it: text, JSON, page, exit codes, wrong input."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Command = Callable[..., Any]

NAME = "filters_under_audit"


def test_a_right_filter_passes_as_text_and_as_a_page(medpfl: Command, tmp_path: Path) -> None:
    page = tmp_path / "filter.html"
    ended = medpfl(
        "filter", f"{NAME}:ClipAndNoise", "--set", "noise_multiplier=2", "--epsilon", 12, "--delta", "1e-5",
        "--rounds", 20, "--victims", 0, "--out", page,
    )  # fmt: skip
    assert ended.code == 0, ended
    assert "what it claims follows from what it does" in ended.out
    assert "The claimed epsilon of 12 holds" in ended.out
    html = page.read_text()
    assert html.count("<main>") == 1
    assert "noise_multiplier = 2" in html
    assert "claimed: ε = 12 at δ = 1e-05 over 20 rounds" in html


def test_a_broken_filter_ends_with_1_and_says_why_in_json(medpfl: Command) -> None:
    ended = medpfl("filter", f"{NAME}:percentile_clipping", "--epsilon", 1, "--victims", 0, "--json")
    assert ended.code == 1
    found = json.loads(ended.out)
    assert found["passed"] is False
    assert "adds no noise" in found["verdict"]
    assert {finding["level"] for finding in found["findings"]} >= {"problem", "good"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([f"{NAME}:nothing_of_this_name"], "has no 'nothing_of_this_name'"),
        (["no_such_module:filter"], "found no module 'no_such_module'"),
        ([f"{NAME}:ClipAndNoise", "--set", "clip"], "expected NAME=VALUE"),
        ([f"{NAME}:ClipAndNoise", "--set", "clop=1"], "did you mean 'clip'"),
        ([f"{NAME}:ClipAndNoise", "--set", "clip=-1"], "clip must be positive"),
    ],
)
def test_wrong_input_is_one_message(medpfl: Command, arguments: list[str], said: str) -> None:
    assert said in medpfl("filter", *arguments).refused()


def test_a_page_that_cannot_be_written_is_one_message(medpfl: Command, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    ended = medpfl("filter", f"{NAME}:signs", "--victims", 0, "--out", file / "page.html")
    ended.refused()
