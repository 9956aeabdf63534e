"""FLARE's server records, a site's policy holds, and in which order filters run, in FLARE's own chains."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("nvflare", reason="needs NVIDIA FLARE: pip install 'medpfl[nvflare]'")

from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.event_type import EventType
from nvflare.apis.filter import ContentBlockedException, Filter, FilterChainType, FilterContextKey
from nvflare.apis.fl_constant import FilterKey, FLContextKey, ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.apis.utils.task_utils import apply_filters
from nvflare.apis.workspace import Workspace
from nvflare.private.fed.app.fl_conf import create_privacy_manager
from nvflare.private.fed.utils.fed_utils import nvflare_fobs_initialize
from nvflare.private.privacy_manager import PrivacyService, Scope

from medpfl.core.errors import InputError, StoreError
from medpfl.federation.recording import Recorder, Recording, read_recording
from medpfl.integrations.flare import (
    DefenseFilter,
    GateFilter,
    ReceivedFilter,
    RecordingFilter,
    VettingFilter,
    policy_problems,
    write_policy,
)
from medpfl.integrations.flare.recording import SHARED

DATA, RESULT = Scope.TASK_DATA_FILTERS_NAME, Scope.TASK_RESULT_FILTERS_NAME


def weights(value: float, kind: str = DataKind.WEIGHTS, number: int | None = 0, **meta: Any) -> Shareable:
    arrays = {"w": np.full(3, value, dtype=np.float32), "n.num_batches_tracked": np.array(int(value))}
    made = DXO(kind, data=arrays, meta=meta).to_shareable()
    if number is not None:
        made.set_header("current_round", number)
    return made


def context(here: str, peer: str = "") -> FLContext:
    made = FLContext()
    made.set_prop(ReservedKey.IDENTITY_NAME, here, private=False, sticky=False)
    made.set_prop(FLContextKey.TASK_NAME, "train", private=True, sticky=False)
    if peer:
        made.set_peer_context(context(peer))
    return made


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[RecordingFilter, RecordingFilter]]:
    """The server's filters of what goes out and of what comes in, as FLARE makes them: two objects."""
    yield _pair(tmp_path / "recording")
    SHARED.close()


def _pair(folder: Path) -> tuple[RecordingFilter, RecordingFilter]:
    out, back = RecordingFilter(str(folder)), RecordingFilter(str(folder), images_per_step=4)
    out.set_prop(FilterContextKey.CHAIN_TYPE, FilterChainType.TASK_DATA_CHAIN)
    back.set_prop(FilterContextKey.CHAIN_TYPE, FilterChainType.TASK_RESULT_CHAIN)
    return out, back


def recorded(folder: Path) -> Recording:
    """What the recorder wrote until the end of the run."""
    RecordingFilter(str(folder / "recording")).handle_event(EventType.END_RUN, FLContext())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("medpfl-recording")]
    return read_recording(folder / "recording")


class TestRecording:
    """The server's recorder."""

    def test_what_is_sent_and_answered_is_recorded_and_stays_as_it_is(self, server: Any, tmp_path: Path) -> None:
        out, back = server
        for number in (0, 1):
            for place, site in enumerate(("site-1", "site-2")):
                sent = weights(number, number=number)
                assert out.process(sent, context("server", site)) is sent
                answer = weights(number + place + 1, number=number, NUM_STEPS_CURRENT_ROUND=2, loss=0.5)
                before = answer["DXO"]["data"]["w"].copy()
                assert back.process(answer, context("server", site)) is answer
                assert np.array_equal(answer["DXO"]["data"]["w"], before)
        recording = recorded(tmp_path)
        assert recording.rounds == (0, 1)
        assert recording.about.source.startswith("nvflare 2")
        found = {(one.round, one.client): one for one in recording.updates}
        assert set(found) == {(number, site) for number in (0, 1) for site in ("site-1", "site-2")}
        one = found[1, "site-2"]
        assert (one.examples, one.kind, one.config["loss"]) == (8, "weights", 0.5)
        assert one.tensors["w"].tolist() == [3.0, 3.0, 3.0]
        sent_to = recording.sent_to(one)
        assert sent_to is not None
        assert sent_to.tensors["w"].tolist() == [1.0, 1.0, 1.0]
        assert sent_to.tensors["n.num_batches_tracked"].dtype == torch.int64

    def test_changes_and_answers_without_a_round_or_steps(self, server: Any, tmp_path: Path) -> None:
        out, back = server
        out.process(weights(1, number=4), context("server", "a"))
        back.process(weights(0.5, DataKind.WEIGHT_DIFF, number=None), context("server", "a"))
        (one,) = recorded(tmp_path).updates
        assert (one.round, one.kind, one.examples) == (4, "delta", None)

    def test_a_site_that_withholds_or_sends_rubbish_is_a_line_of_the_log(self, server: Any, tmp_path: Path) -> None:
        out, back = server
        half = np.ones(2, dtype=np.float16)
        answers = {
            "withholds": make_reply(ReturnCode.TASK_RESULT_FILTER_ERROR),
            "rubbish": Shareable({"weights": [1, 2]}),
            "object": DXO(DataKind.WEIGHTS, {"w": object()}).to_shareable(),
            "empty": DXO(DataKind.WEIGHTS, {}).to_shareable(),
            "analytic": DXO(DataKind.ANALYTIC, {"x": 1}).to_shareable(),
            "half": DXO(DataKind.WEIGHTS, {"w": half, "b": torch.ones(2, dtype=torch.bfloat16)}).to_shareable(),
            "metrics": DXO(DataKind.METRICS, {"auc": 0.5}).to_shareable(),
        }
        for site, answer in answers.items():
            out.process(weights(0), context("server", site))
            assert back.process(answer, context("server", site)) is answer
        recording = recorded(tmp_path)
        (kept,) = recording.updates
        assert (kept.client, kept.tensors["w"].dtype, kept.tensors["b"].dtype) == (
            "half",
            torch.float16,
            torch.bfloat16,
        )
        for site in ("withholds", "rubbish", "object", "empty", "analytic"):
            assert any(site in problem for problem in recording.problems), site
        assert not any("metrics" in problem for problem in recording.problems)

    def test_a_site_that_dies_in_the_middle_of_a_round_is_told_once(self, server: Any, tmp_path: Path) -> None:
        out, back = server
        for number in (0, 1, 2):
            for site in ("a", "b") if number < 2 else ("a",):
                out.process(weights(number, number=number), context("server", site))
                if (site, number) != ("b", 1):
                    back.process(weights(number + 1, number=number), context("server", site))
        recording = recorded(tmp_path)
        assert recording.problems == ("round 1, client b: no answer came before the next round",)
        assert len(recording.updates) == 4

    def test_a_folder_in_use_stops_no_training(
        self, server: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        out, back = server
        with Recorder(tmp_path / "recording") as other:
            other.sent(7, {"w": torch.zeros(1)})
            answer = weights(1)
            assert out.process(weights(0), context("server", "a")) is not None
            assert back.process(answer, context("server", "a")) is answer
        warned = [line.getMessage() for line in caplog.records if "nothing is recorded" in line.getMessage()]
        assert len(warned) == 1
        assert "another recorder writes there" in warned[0]
        assert not recorded(tmp_path).updates

    def test_a_full_disk_ends_the_recording_and_not_the_training(
        self, server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        out, back = server
        out.process(weights(0), context("server", "a"))

        def full(*_: Any) -> None:
            raise StoreError("no space left")

        assert SHARED.behind is not None
        SHARED.behind.wait()
        recorder = SHARED.recorders[(tmp_path / "recording").resolve()]
        assert isinstance(recorder, Recorder)
        monkeypatch.setattr(recorder._storage, "write", full)
        for _ in range(2):
            answer = weights(1)
            assert back.process(answer, context("server", "a")) is answer
        SHARED.close()
        assert "no space left" in recorder.stopped

    def test_other_tasks_are_not_recorded(self, server: Any, tmp_path: Path) -> None:
        out, _ = server
        task = context("server", "a")
        task.set_prop(FLContextKey.TASK_NAME, "validate", private=True, sticky=False)
        out.process(weights(0), task)
        assert not (tmp_path / "recording").exists()

    @pytest.mark.parametrize(
        "changed", [{"folder": ""}, {"limit": 0}, {"images_per_step": 0.5}, {"tasks": "train"}, {"channel": 3}]
    )
    def test_wrong_parameters(self, changed: Any) -> None:
        with pytest.raises(InputError, match=next(iter(changed))):
            RecordingFilter(**{"folder": "recording", **changed})


class Spy(Filter):
    """A job's filter: keeps what it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[float] = []

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        self.seen.append(float(from_shareable(shareable).data["w"][0]))
        return shareable


class Undo(Filter):
    """A job's filter that sends what the job chooses, whatever the site's filters made of it."""

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        return weights(1.0)


class TestPolicy:
    """A site's `local/privacy.json`, read and run by FLARE's own code."""

    @pytest.fixture
    def policy(self, tmp_path: Path) -> Iterator[FLContext]:
        """The context of a job that names no scope, at a site that clips to 0.1."""
        for folder in ("local", "startup"):
            (tmp_path / folder).mkdir()
        folder = str(tmp_path / "guards")
        write_policy(
            tmp_path / "local", [ReceivedFilter(folder), DefenseFilter(folder, {"name": "clip", "bound": 0.1})]
        )
        nvflare_fobs_initialize()
        before = PrivacyService.manager
        PrivacyService.initialize(create_privacy_manager(Workspace(str(tmp_path), "site-1"), names_only=False))
        made = context("site-1")
        made.set_prop(FLContextKey.SCOPE_OBJECT, PrivacyService.get_scope(""), private=True, sticky=False)
        yield made
        PrivacyService.initialize(before)

    def test_every_job_meets_the_sites_filters_and_the_bytes_that_leave_are_defended(self, policy: FLContext) -> None:
        apply_filters(DATA, weights(0.0), policy, {}, "train", FilterKey.IN)
        left = apply_filters(RESULT, weights(1.0), policy, {}, "any name of a task", FilterKey.OUT)
        wire = Shareable.from_bytes(left.to_bytes())
        change = from_shareable(wire).data["w"]
        assert float(np.linalg.norm(change)) == pytest.approx(0.1, rel=1e-4)
        raw = np.float32(1.0).tobytes() * 3
        assert raw in weights(1.0).to_bytes()
        assert raw not in left.to_bytes()

    def test_filters_of_the_job_run_after_those_of_the_site_inward_and_outward(self, policy: FLContext) -> None:
        spy = Spy()
        job = {"train/in": [spy], "train/out": [spy]}
        assert FilterKey.DELIMITER == "/"
        apply_filters(DATA, weights(0.0), policy, job, "train", FilterKey.IN)
        apply_filters(RESULT, weights(1.0), policy, job, "train", FilterKey.OUT)
        assert spy.seen == [0.0, pytest.approx(0.1 / np.sqrt(3), rel=1e-4)]

    def test_so_a_job_can_replace_what_the_sites_filters_made(self, policy: FLContext) -> None:
        apply_filters(DATA, weights(0.0), policy, {}, "train", FilterKey.IN)
        left = apply_filters(RESULT, weights(1.0), policy, {"train/out": [Undo()]}, "train", FilterKey.OUT)
        wire = Shareable.from_bytes(left.to_bytes())
        assert from_shareable(wire).data["w"].tolist() == [1.0, 1.0, 1.0]

    def test_what_no_filter_can_read_does_not_leave(self, policy: FLContext) -> None:
        apply_filters(DATA, weights(0.0), policy, {}, "train", FilterKey.IN)
        with pytest.raises(ContentBlockedException, match=r"^withheld$"):
            apply_filters(RESULT, Shareable({"raw": np.ones(3)}), policy, {}, "train", FilterKey.OUT)

    def test_a_job_may_name_any_scope_that_the_site_defines(self, policy: FLContext, tmp_path: Path) -> None:
        path = tmp_path / "local" / "privacy.json"
        assert policy_problems(tmp_path / "local") == []
        found = json.loads(path.read_text())
        found["scopes"].append({"name": "open", "properties": {}, "task_data_filters": [], "task_result_filters": []})
        path.write_text(json.dumps(found))
        PrivacyService.initialize(create_privacy_manager(Workspace(str(tmp_path), "site-1"), names_only=False))
        assert PrivacyService.is_scope_allowed("open")
        policy.set_prop(FLContextKey.SCOPE_OBJECT, PrivacyService.get_scope("open"), private=True, sticky=False)
        left = apply_filters(RESULT, weights(1.0), policy, {}, "train", FilterKey.OUT)
        assert from_shareable(left).data["w"].tolist() == [1.0, 1.0, 1.0]
        problems = policy_problems(tmp_path / "local")
        assert any("'open' has no filter" in problem for problem in problems)
        assert any("define one only" in problem for problem in problems)

    def test_parameters_that_are_wrong_end_the_job(self, policy: FLContext, tmp_path: Path) -> None:
        path = tmp_path / "local" / "privacy.json"
        path.write_text(path.read_text().replace('"bound": 0.1', '"bound": -1'))
        with pytest.raises(Exception, match="bound"):
            create_privacy_manager(Workspace(str(tmp_path), "site-1"), names_only=False)

    def test_all_parameters_come_back_from_the_file(self, tmp_path: Path) -> None:
        (tmp_path / "startup").mkdir()
        folder = str(tmp_path / "{site}")
        write_policy(
            tmp_path / "local",
            [
                VettingFilter(folder, "lenet_dlg", [1, 12, 12], guard={"withhold": "leaks"}, withheld=2),
                DefenseFilter(folder, {"compose": [{"name": "clip", "bound": 0.5}, {"name": "gaussian", "std": 0.1}]}),
                DefenseFilter(folder, {"name": "gaussian", "std": 0.25}),
                GateFilter(folder, "lenet_dlg", [1, 12, 12], "m:f", {"batch_size": 4}, images_arguments={"data": "x"}),
            ],
        )
        manager = create_privacy_manager(Workspace(str(tmp_path), "site-1"), names_only=False)
        scope = manager.get_scope("")
        (vetting,) = scope.task_data_filters["in"]
        both, noise, gate = scope.task_result_filters["out"]
        assert (vetting.checking.withhold, vetting.limit.withheld, vetting.folder) == ("leaks", 2, folder)
        assert [type(part).__name__ for part in both.applied.parts] == ["Clip", "Gaussian"]
        assert noise.applied.std == 0.25
        assert (gate.agreed.batch_size, gate.images_arguments, gate.checking.psnr) == (4, {"data": "x"}, 25.0)

    def test_what_makes_no_policy(self, tmp_path: Path) -> None:
        came, leaves = ReceivedFilter("f"), DefenseFilter("f", {"name": "clip"})
        for filters in ([came], [leaves], [came, leaves, RecordingFilter("r")]):
            with pytest.raises(InputError):
                write_policy(tmp_path, filters)
        assert "there is none" in policy_problems(tmp_path)[0]
        write_policy(tmp_path, [came, leaves])
        with pytest.raises(InputError, match="stands there"):
            write_policy(tmp_path, [came, leaves])
