"""Numbers to sentences: what a reader who knows no statistics is told."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from medpfl.report import answer, settings, wording
from medpfl.report.comparison import Change, DatasetOutcome, DefenseOutcome, Level, change, level, outcomes, strongest
from medpfl.report.views import Audit, Cell, ImageResult, Measured, Null

NULLS = {
    "nearest": Null("nearest", psnr=19.8, ssim=0.43, asr=0.0),
    "noise": Null("noise", psnr=8.0, ssim=0.01, asr=0.0),
}
AXES = {
    "dataset": "brain", "model": "lenet_dlg", "recipe": "gradient-b1", "threat_model": "eavesdropper",
    "channel": "plain", "defense": "none", "guard": "none", "attack": "dlg",
}  # fmt: skip
PARAMS: dict[str, dict[str, Any]] = {
    "model": {"source": "lenet_dlg", "state": "untrained"},
    "recipe": {"update": "gradient", "batch_size": 1, "batch_norm": "train"},
}


def cell(**changes: Any) -> Cell:
    """A cell in which 14 of 16 images were reconstructed, with changes; axes are given by their names."""
    axes = {**AXES, **{name: changes.pop(name) for name in AXES if name in changes}}
    settings: dict[str, Any] = {
        "id": "/".join(axes.values()),
        "axes": axes,
        "params": PARAMS,
        "victims": 16,
        "images": 16,
        "done": 16,
        "asr": Measured(0.875, 0.6875, 1.0),
        "psnr": Measured(34.2, 30.1, 38.0),
        "ssim": Measured(0.93, 0.9, 0.96),
        "nulls": NULLS,
        "gain_psnr": 14.4,
    }
    return Cell(**{**settings, **changes})


def rows(ssims: list[float], psnrs: list[float], name: str = "c", status: str = "done") -> tuple[ImageResult, ...]:
    """One victim per score."""
    return tuple(
        ImageResult(
            f"{name}/v{i}", name, "0", str(i), "0", 0, "item", status, "", success=ssim >= 0.9, ssim=ssim, psnr=psnr
        )
        for i, (ssim, psnr) in enumerate(zip(ssims, psnrs, strict=True))
    )


def outcome(*cells: Cell) -> DatasetOutcome:
    """The one data set of these cells."""
    return outcomes(Audit("a", tuple(cells)))[0]


NOTHING_PASSED: dict[str, Any] = {"asr": Measured(0.0, 0.0, 0.206), "ssim": Measured(0.4, 0.35, 0.45)}
TRACES: dict[str, Any] = {**NOTHING_PASSED, "psnr": Measured(24.0, 22.0, 26.0), "gain_psnr": 4.2}
NULL_LEVEL: dict[str, Any] = {**NOTHING_PASSED, "psnr": Measured(20.0, 18.0, 22.0), "gain_psnr": 0.2}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "reconstructed"),
        ({"asr": Measured(1 / 16, 0.0, 0.2)}, "reconstructed"),
        (TRACES, "closer"),
        (NULL_LEVEL, "null_level"),
        ({**NULL_LEVEL, "psnr": Measured(12.0, 11.0, 13.0)}, "null_level"),
        ({"nulls": {}}, "unjudged"),
        ({"done": 0, "failed": 16, "asr": Measured(0.0, 0.0, 0.2), "psnr": Measured()}, "nothing"),
        ({"done": 0, "blocked": 16, "asr": Measured(0.0, 0.0, 0.2), "psnr": Measured()}, "blocked"),
    ],
)
def test_level_compares_with_the_cells_own_nulls(changes: dict[str, Any], expected: Level) -> None:
    assert level(cell(**changes)) == expected


def test_passing_as_often_as_another_picture_is_not_a_reconstruction() -> None:
    flat = {"nearest": Null("nearest", psnr=33.0, ssim=0.92, asr=0.8)}
    similar = cell(nulls=flat, psnr=Measured(33.5, 32.0, 35.0), ssim=Measured(0.92, 0.9, 0.94), gain_psnr=0.5)
    assert level(similar) == "null_level"
    assert answer.headline(outcome(similar)) == (
        "The attack passed the threshold no more surely than the null baselines, and what came back is not clearly "
        "closer to the truth than the null baselines."
    )
    assert level(replace(similar, asr=Measured(0.95, 0.9, 1.0))) == "reconstructed"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"asr": Measured(1.0, 0.79, 1.0)}, "All images could be reconstructed."),
        ({}, "Most images could be reconstructed."),
        ({"asr": Measured(0.25, 0.1, 0.5)}, "Some images could be reconstructed."),
        (
            TRACES,
            "No image passed the threshold, but what came back shows more of the private images than the null "
            "baselines do.",
        ),
        (
            NULL_LEVEL,
            "No image passed the threshold, and what came back is not clearly closer to the truth than the null "
            "baselines.",
        ),
        ({"nulls": {}}, "Something came back, but no null baseline was stored, so the numbers cannot be judged."),
        (
            {"done": 0, "failed": 16, "asr": Measured(0.0, 0.0, 0.2)},
            "Every case that was tried failed, so nothing is known. A failed attack is not a weak one.",
        ),
        ({"done": 0, "status": "partial", "asr": Measured()}, "No case has finished, so nothing is known yet."),
        (
            {"status": "refused", "done": 0, "asr": Measured()},
            "Every combination was refused before anything was computed, so nothing is known.",
        ),
        (
            {"oracle": ("labels",)},
            "Only attacks with oracle knowledge finished, so nothing is known about a real adversary.",
        ),
        (
            {"done": 0, "blocked": 16, "asr": Measured(0.0, 0.0, 0.2)},
            "A guard stopped every case that was not refused or failed: the adversary received nothing from these.",
        ),
    ],
)
def test_headline(changes: dict[str, Any], expected: str) -> None:
    assert answer.headline(outcome(cell(**changes))) == expected


@pytest.mark.parametrize("changes", [{}, TRACES, NULL_LEVEL, {"nulls": {}}, {"done": 0, "asr": Measured()}])
def test_nothing_is_ever_called_safe(changes: dict[str, Any]) -> None:
    found = outcome(cell(**changes))
    texts = [answer.headline(found), answer.overall((found,)), answer.caution_null(found, 0.9)]
    for text in texts:
        assert "safe" not in text.replace("does not show that updates are safe", "")
        assert "protect" not in text


def test_the_strongest_attack_is_told_with_its_null_beside_every_number() -> None:
    with_rows = cell(results=rows([0.95] * 14 + [0.5] * 2, [34.2] * 16))
    assert wording.strongest_attack(with_rows, 0.9) == (
        "dlg against lenet_dlg (untrained), with no defense: 14 of 16 images (88%; 95% interval 69% to 100%) with SSIM "
        "of at least 0.9; no null baseline reached that for any image. Mean PSNR is 34.2 dB (30.1 to 38.0) against "
        "19.8 dB for the most similar other image, 14.4 dB more."
    )


def test_a_reconstruction_worse_than_another_picture_is_told_so() -> None:
    assert wording.fidelity(cell(psnr=Measured(15.0, 14.0, 16.0), gain_psnr=-4.8)) == (
        "Mean PSNR is 15.0 dB (14.0 to 16.0) against 19.8 dB for the most similar other image, 4.8 dB less."
    )


def test_a_missing_null_is_told() -> None:
    text = wording.strongest_attack(cell(nulls={}, gain_psnr=None), 0.9)
    assert "no null baseline was stored to compare with" in text
    assert "with no null baseline to compare with" in text


def test_successful_nulls_are_named() -> None:
    nulls = {"nearest": Null("nearest", 20.0, 0.8, 0.25), "class_mean": Null("class_mean", 18.0, 0.5, 0.0)}
    assert wording.null_rate(cell(nulls=nulls)) == (
        "handing over the most similar other image reached that for 25% "
        "and the mean image of the class reached that for 0%"
    )


def test_one_victim_has_no_interval() -> None:
    assert "one victim, so no interval" in wording.rate(cell(images=1, asr=Measured(1.0)))


def test_a_count_that_contradicts_the_stored_rate_is_not_shown() -> None:
    contradicting = cell(results=rows([0.1] * 16, [10.0] * 16))
    assert wording.rate(contradicting) == "88% of 16 images (95% interval 69% to 100%)"


def test_assumptions_name_adversary_update_batch_model_and_batch_norm() -> None:
    text = wording.assumptions(cell())
    assert text == (
        "The adversary is an eavesdropper who reads the messages of one client. The client sends the gradient of 1 "
        "image, batch norm in train mode. The model is lenet_dlg, untrained. There is no secure aggregation."
    )


def test_assumptions_of_federated_averaging_behind_secure_aggregation() -> None:
    params = {
        "model": {"state": {"trained": {"epochs": 5, "victims": "never"}}},
        "recipe": {"update": "delta", "batch_size": 8, "local_steps": 4, "learning_rate": 0.05, "optimizer": "adam"},
        "threat_model": {"name": "malicious_server", "can": ["parameters"], "knows": ["auxiliary"]},
        "channel": {"name": "secure_sum", "clients": 8},
    }
    text = wording.assumptions(cell(params=params, threat_model="bad", channel="sum-8"))
    assert "a malicious server that may change what it sends (the tensors it sends)" in text
    assert "was granted images of other patients" in text
    assert "the change of its weights after 4 local steps on 32 images (batch size 8, adam, learning rate 0.05)" in text
    assert "trained for 5 epochs, victims not among the images" in text
    assert "Updates go through sum-8 over 8 clients, so that only their mean arrives." in text


def test_strongest_ranks_by_success_then_quality_and_ignores_unfinished_cells() -> None:
    weak = cell(attack="weak", asr=Measured(0.0, 0.0, 0.2), psnr=Measured(30.0))
    sharp = cell(attack="sharp", asr=Measured(0.0, 0.0, 0.2), psnr=Measured(31.0))
    failed = cell(attack="failed", done=0, asr=Measured(0.0))
    assert strongest([weak, sharp, failed]) is sharp
    assert strongest([weak, sharp, cell(attack="best", asr=Measured(0.1), psnr=Measured(5.0))]).attack == "best"  # type: ignore[union-attr]
    assert strongest([failed]) is None


def test_oracle_results_do_not_count_in_the_answer() -> None:
    honest = cell(attack="dlg", **TRACES)
    oracle = cell(attack="gradinv", oracle=("labels",))
    found = outcome(honest, oracle)
    assert found.strongest is honest
    assert found.strongest_oracle is oracle
    assert "could be reconstructed" not in answer.overall((found,))
    told = wording.oracle(oracle, 0.9)
    assert told.startswith("Knowing the labels, which a real adversary would not: gradinv against")
    assert told.endswith("This is an upper bound and is not counted above.")


def test_a_defense_is_compared_on_the_same_victims() -> None:
    before = cell(results=rows([0.95, 0.95, 0.95, 0.5], [30.0, 32.0, 34.0, 36.0]))
    after = cell(defense="laplace-100", results=rows([0.4, 0.95, 0.3, 0.2], [20.0, 22.0, 24.0, 26.0]))
    found = change(after, before)
    assert found is not None
    assert (found.victims, found.successes_before, found.successes_after) == (4, 3, 1)
    assert found.psnr == Measured(-10.0, -10.0, -10.0)
    change_in_words = (
        " on the same 4 victims without defense, images reconstructed went from 3 to 1 of 4; "
        "mean PSNR fell by 10.0 dB (95% interval 10.0 to 10.0)."
    )
    assert wording.defense_change(found, "dlg") == f"Compared with the same attack{change_in_words}"
    assert wording.defense_change(found, "cpl-informed") == f"Compared with dlg{change_in_words}"


def test_victims_that_only_one_of_two_cells_has_are_left_out() -> None:
    before = cell(results=rows([0.95, 0.95], [30.0, 40.0]))
    after = cell(defense="laplace-100", results=rows([0.95], [20.0]))
    found = change(after, before)
    assert found is not None
    assert (found.victims, found.images, found.psnr.value) == (1, 1, -10.0)
    assert change(cell(results=()), before) is None


def test_a_failed_image_counts_as_not_reconstructed_in_a_comparison_and_not_in_the_means() -> None:
    before = cell(results=rows([0.95, 0.95], [30.0, 40.0]))
    broken = replace(rows([0.95, 0.95], [30.0, 40.0])[1], status="failed", success=False, psnr=None, ssim=None)
    after = cell(defense="laplace-100", results=(rows([0.95], [20.0])[0], broken))
    found = change(after, before)
    assert found is not None
    assert (found.images, found.successes_before, found.successes_after) == (2, 2, 1)
    assert found.psnr.value == -10.0


def test_psnr_changes_whose_interval_spans_zero_are_not_called_changes() -> None:
    base = Change(cell(), 4, 4, Measured(0.3, -0.5, 1.1), 0, 0)
    assert "did not clearly change" in wording.defense_change(base, "dlg")
    assert "rose by 2.0 dB" in wording.defense_change(replace(base, psnr=Measured(2.0, 1.0, 3.0)), "dlg")
    assert "too few victims" in wording.defense_change(replace(base, psnr=Measured(-2.0)), "dlg")
    assert "cannot be compared" in wording.defense_change(replace(base, psnr=Measured()), "dlg")


def test_a_defense_is_compared_within_its_own_setting() -> None:
    other_model = cell(model="resnet18_cifar", results=rows([0.99] * 2, [50.0] * 2), asr=Measured(1.0))
    same_model = cell(results=rows([0.95, 0.5], [30.0] * 2), asr=Measured(0.5))
    defended = cell(defense="laplace-100", results=rows([0.4, 0.3], [20.0] * 2), asr=Measured(0.0))
    found = outcome(other_model, same_model, defended)
    assert found.strongest is other_model
    laplace = next(entry for entry in found.defenses if entry.cells[0].defense == "laplace-100")
    assert laplace.change is not None
    assert laplace.change.undefended is same_model


def test_each_setting_has_its_own_strongest_attack_without_defense() -> None:
    small = cell(asr=Measured(0.9))
    large = cell(model="resnet18_cifar", asr=Measured(0.1))
    defended = cell(model="resnet18_cifar", defense="laplace-100", asr=Measured(0.2))
    only_defended = cell(recipe="delta-s4-b8", defense="laplace-100", asr=Measured(0.3))
    oracle = cell(model="resnet18_cifar", attack="gradinv", oracle=("labels",), asr=Measured(1.0))
    found = outcome(small, large, defended, only_defended, oracle).settings
    assert [(entry.name, entry.strongest) for entry in found] == [
        ("lenet_dlg, gradient-b1", small),
        ("resnet18_cifar, gradient-b1", large),
        ("lenet_dlg, delta-s4-b8", only_defended),
    ]


def test_no_defense_stands_first_and_a_labeled_none_is_no_defense() -> None:
    params = {**PARAMS, "defense": {"name": "none"}}
    plain = cell(defense="baseline", params=params)
    defended = cell(defense="laplace-100")
    found = outcome(defended, plain)
    assert [entry.cells[0] for entry in found.defenses] == [plain, defended]
    assert settings.defense(plain) == "no defense"


def test_whether_somebody_who_knows_the_defense_attacked_it_is_told() -> None:
    blind = cell(defense="laplace-100")
    knowing = cell(defense="laplace-100", attack="cpl-informed", adaptive=True)
    knowing_with_oracle = replace(knowing, oracle=("labels",))
    for cells, expected in (
        ([blind], "No attack that knows this defense was run; an informed one can do better."),
        ([blind, knowing], "Attacked with knowledge of the defense by cpl-informed."),
        ([blind, knowing_with_oracle], "No attack that knows this defense was run; an informed one can do better."),
    ):
        assert wording.informed(outcome(*cells).defenses[0]) == expected


def test_classes_that_an_attack_gets_through_to_are_told_apart() -> None:
    found = rows([0.1, 0.1, 0.95, 0.95, 0.5], [4.0, 6.0, 31.0, 33.0, 12.0])
    labeled = tuple(replace(row, label=label) for row, label in zip(found, "00112", strict=True))
    told = wording.classes_apart(cell(defense="laplace-100", results=labeled))
    assert told.startswith(
        "All 2 images of class 0 stayed below the null baselines (median PSNR 5.0 dB), all of class 1 "
    )
    assert "class 2" not in told  # one image says nothing about a class
    mixed = tuple(replace(row, label=label) for row, label in zip(found, "01010", strict=True))
    assert wording.classes_apart(cell(defense="laplace-100", results=mixed)) == ""
    assert wording.classes_apart(cell(results=labeled, nulls={})) == ""


def test_a_sentence_about_several_defenses_is_written_once() -> None:
    plain = cell(defense="none", params={**PARAMS, "defense": {"name": "none"}})
    found = outcome(plain, cell(defense="weak"), cell(defense="strong"), cell(defense="unlike", adaptive=True))
    notes = wording.defense_notes(found, {"weak": ["no bound"], "strong": ["no bound", "slow"]})
    assert [(note.number, note.text.split(" ")[0], note.defenses, note.warning) for note in notes] == [
        (1, "No", ("weak", "strong"), False),
        (2, "no", ("weak", "strong"), True),
        (3, "slow", ("strong",), True),
        (4, "Attacked", ("unlike",), False),
    ]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "Images are still reconstructed."),
        (
            TRACES,
            "No image passes the threshold, but what comes back is closer to the truth than the null baselines by PSNR.",
        ),
        (NULL_LEVEL, "Not clearly beyond the null baselines."),
        ({"done": 0, "asr": Measured()}, "No case has finished."),
        ({"oracle": ("labels",)}, "Only attacks with oracle knowledge finished."),
        ({"done": 0, "blocked": 16, "asr": Measured(0.0)}, "A guard stopped every case that did not fail."),
    ],
)
def test_what_a_defense_leaves(changes: dict[str, Any], expected: str) -> None:
    found: DefenseOutcome = outcome(cell(defense="laplace-100", **changes)).defenses[0]
    assert wording.defense_left(found) == expected


def test_the_null_caution_quotes_the_audits_own_nearest_image() -> None:
    assert answer.caution_null(outcome(cell()), 0.9) == (
        "Read these numbers against this one: the most similar other image, which owes nothing to any update, already "
        "scores a mean SSIM of 0.43 and 19.8 dB here, and passes the threshold of 0.9 for 0%."
    )
    assert answer.caution_null(outcome(cell(nulls={"noise": NULLS["noise"]})), 0.9) == ""


def test_unfinished_counts_cases_and_not_images() -> None:
    two_images = tuple(replace(row, case="same", status="failed") for row in rows([0.1, 0.1], [10.0, 10.0]))
    text = answer.unfinished((cell(results=two_images), cell(status="refused"), cell(status="partial")))
    assert text == (
        "1 case failed; its images count as not reconstructed and stand outside the means. "
        "1 cell was refused as not possible. 1 cell is not finished yet."
    )
    assert answer.unfinished((cell(),)) == ""


COUNTS = {"cells": 3, "refused": 1, "cases": 32, "done": 30, "failed": 2, "blocked": 0}


@pytest.mark.parametrize(
    ("finished", "counts", "expected"),
    [
        (True, COUNTS, "The audit is complete: 30 of 32 cases finished, 2 failed. 1 cell was refused as not possible."),
        (True, {**COUNTS, "done": 32, "failed": 0, "refused": 0}, "The audit is complete: 32 of 32 cases finished."),
        (
            False,
            {**COUNTS, "done": 10, "failed": 0, "blocked": 1, "refused": 0},
            "This audit is not complete: 10 of 32 cases finished so far, 1 stopped by a guard. "
            "The numbers below will change.",
        ),
        (
            True,
            {**COUNTS, "cases": 0, "done": 0, "failed": 0, "refused": 3},
            "The audit is complete, but no case could be computed. 3 cells were refused as not possible.",
        ),
    ],
)
def test_completeness(finished: bool, counts: dict[str, int], expected: str) -> None:
    assert answer.completeness(Audit("a", finished=finished, counts=counts)) == expected


@pytest.mark.parametrize(
    ("text", "holds", "finished", "expected"),
    [
        ("", None, True, ""),
        ("asr <= 0.05", False, True, "The limit asr <= 0.05 does not hold: at least one cell is beyond it."),
        (
            "asr <= 0.05",
            True,
            True,
            "The limit asr <= 0.05 holds in every finished cell, for the attacks and settings of this audit.",
        ),
        (
            "asr <= 0.05",
            True,
            False,
            "The limit asr <= 0.05 holds in every cell with a result, for the attacks and settings of this audit.",
        ),
        (
            "asr <= 0.05",
            None,
            False,
            "Whether the limit asr <= 0.05 holds cannot be said: no finished cell has this number.",
        ),
    ],
)
def test_limit(text: str, holds: bool | None, finished: bool, expected: str) -> None:
    assert answer.limit(Audit("a", finished=finished, limit_text=text, limit_holds=holds)) == expected


def test_the_overall_answer_names_every_data_set_once() -> None:
    given, traces = outcome(cell(dataset="brain")), outcome(cell(dataset="skin", **TRACES))
    level_with_nulls, unknown = outcome(cell(dataset="chest", **NULL_LEVEL)), outcome(cell(dataset="eye", done=0))
    text = answer.overall((given, traces, level_with_nulls, unknown))
    assert text == (
        "Private images could be reconstructed from what clients send in 1 of 4 data sets (brain). "
        "No image from skin counts as reconstructed, but more was shown than the null baselines show. "
        "No attack without oracle knowledge went clearly beyond the null baselines on chest. "
        "This does not show that updates are safe to send. "
        "Nothing can be said about eye: no result there could be judged."
    )


@pytest.mark.parametrize(
    ("cells", "expected"),
    [
        ([cell()], "Private images could be reconstructed from what clients send."),
        (
            [cell(**NULL_LEVEL)],
            "No attack without oracle knowledge went clearly beyond the null baselines. "
            "This does not show that updates are safe to send.",
        ),
        (
            [cell(status="refused", done=0, asr=Measured())],
            "Nothing was measured: every combination was refused, for the reasons given below. "
            "This says nothing about what could be reconstructed.",
        ),
        (
            [cell(done=0, asr=Measured())],
            "Nothing can be said about a real adversary yet: no attack without oracle knowledge finished.",
        ),
        ([cell(nulls={})], "Nothing can be said: no result there could be judged."),
    ],
)
def test_the_overall_answer_for_one_data_set(cells: list[Cell], expected: str) -> None:
    assert answer.overall(outcomes(Audit("a", tuple(cells)))) == expected


def test_an_empty_audit_has_no_answer() -> None:
    assert answer.overall(()) == "There is no result yet."
