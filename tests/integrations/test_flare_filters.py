"""Filters at a site in FLARE's own messages and chains: what passes, what is blocked, and what of the update is left."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("nvflare", reason="needs NVIDIA FLARE: pip install 'medpfl[nvflare]'")

from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.filter import ContentBlockedException, Filter, FilterChainType, FilterContextKey
from nvflare.apis.fl_constant import FLContextKey, ReservedKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable, make_reply
from nvflare.app_common.filters.percentile_privacy import PercentilePrivacy

from medpfl.core.domain import Batch, GlobalModel, Recipe
from medpfl.core.errors import InputError
from medpfl.federation.client import client_step
from medpfl.integrations.flare import DefenseFilter, GateFilter, ReceivedFilter, VettingFilter

SHAPE = [1, 12, 12]
RECIPE: dict[str, Any] = {"batch_size": 16, "learning_rate": 0.1}
HERE = "flare_site_support"


def message(tensors: Mapping[str, Any], kind: str = DataKind.WEIGHTS, number: int = 0, **meta: Any) -> Shareable:
    arrays = {
        name: one.numpy() if isinstance(one, torch.Tensor) and one.dtype != torch.bfloat16 else one
        for name, one in tensors.items()
    }
    made = DXO(kind, data=arrays, meta=meta).to_shareable()
    made.set_header("current_round", number)
    return made


def arrays(made: Shareable) -> dict[str, Any]:
    return dict(from_shareable(made).data)


@pytest.fixture
def task() -> FLContext:
    """The context of one task at site-1."""
    made = FLContext()
    made.set_prop(ReservedKey.IDENTITY_NAME, "site-1", private=False, sticky=False)
    made.set_prop(FLContextKey.TASK_NAME, "train", private=True, sticky=False)
    return made


@pytest.fixture
def site(tmp_path: Path) -> str:
    """The site's folder, as a configuration names it."""
    return str(tmp_path / "{site}")


@pytest.fixture
def lines(tmp_path: Path) -> Callable[[], list[dict[str, Any]]]:
    """What the site's own log says."""

    def read() -> list[dict[str, Any]]:
        return [json.loads(line) for line in (tmp_path / "site-1" / "guards.jsonl").read_text().splitlines()]

    return read


def blocks(made: Filter, sent: Any, task: FLContext) -> None:
    with pytest.raises(ContentBlockedException) as caught:
        made.process(sent, task)
    assert str(caught.value) == "withheld"
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


@pytest.fixture
def dense(monkeypatch: pytest.MonkeyPatch, batch: Batch) -> nn.Module:
    """A net whose first layer gives single images back, and the site's images, both importable by name."""
    import sys
    from types import ModuleType

    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(144, 400), nn.ReLU(), nn.Linear(400, 2))

    def images(site: str, round: int) -> tuple[torch.Tensor, torch.Tensor]:
        return batch.images, batch.targets

    def broken(site: str, round: int) -> None:
        raise RuntimeError("the disk is gone")

    module = ModuleType(HERE)
    vars(module).update(net=lambda: copy.deepcopy(net), images=images, broken=broken)
    monkeypatch.setitem(sys.modules, HERE, module)
    return net


def trained(net: GlobalModel, batch: Batch) -> dict[str, torch.Tensor]:
    update, _ = client_step(net, batch, Recipe(update="weights", **RECIPE))
    return dict(update.trainable)


def dense_trained(net: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    from medpfl.core.tasks import SingleLabel
    from medpfl.models import prepare

    return trained(prepare(net, name="dense", image_shape=(1, 12, 12), task=SingleLabel(2)), batch)


class TestVetting:
    """What comes."""

    def test_an_honest_model_passes_as_it_is(self, site: str, task: FLContext, net: GlobalModel, lines: Any) -> None:
        sent = message(net.parameters)
        passed = VettingFilter(site, "lenet_dlg", SHAPE).process(sent, task)
        assert all(np.array_equal(arrays(passed)[name], one.numpy()) for name, one in net.parameters.items())
        assert [line["outcome"] for line in lines()] == ["passed"]

    def test_a_crafted_first_layer_is_blocked_without_a_reason(
        self, site: str, task: FLContext, dense: nn.Module, lines: Any, caplog: pytest.LogCaptureFixture
    ) -> None:
        crafted = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
        crafted["1.weight"] = torch.full((400, 144), 1 / 144)
        crafted["1.bias"] = -torch.linspace(0.3, 0.7, 400)
        crafted["3.weight"] = torch.full((2, 400), 0.1) * torch.tensor([[1.0], [-1.0]])
        with caplog.at_level(logging.DEBUG):
            blocks(VettingFilter(site, f"{HERE}:net", SHAPE, images=f"{HERE}:images"), message(crafted), task)
        (line,) = lines()
        assert line["level"] == "crafted"
        assert line["reasons"]
        assert "withheld" in caplog.text
        assert not any(reason in caplog.text for reason in line["reasons"]), "logs may be streamed to the server"

    @pytest.mark.parametrize(
        "broken",
        [
            "no dxo",
            "no content",
            "changes",
            "metrics",
            "collection",
            "empty",
            "object",
            "none",
            "code",
            "beside",
            "unknown",
            "shape",
            "nan",
        ],
    )
    def test_what_it_cannot_look_at_is_blocked(
        self, site: str, task: FLContext, net: GlobalModel, lines: Any, broken: str
    ) -> None:
        tensors: dict[str, Any] = {name: one.numpy() for name, one in net.parameters.items()}
        first = next(iter(tensors))
        sent = message(tensors)
        if broken == "no dxo":
            sent = Shareable({"weights": tensors})
        elif broken == "no content":
            del sent["DXO"]
        elif broken == "changes":
            sent = message(tensors, DataKind.WEIGHT_DIFF)
        elif broken == "metrics":
            sent = message({"loss": 0.5}, DataKind.METRICS)
        elif broken == "collection":
            sent = DXO(DataKind.COLLECTION, {"one": DXO(DataKind.WEIGHTS, tensors)}).to_shareable()
        elif broken == "empty":
            sent = message({})
        elif broken == "object":
            sent = message({**tensors, first: object()})
        elif broken == "none":
            sent["DXO"]["data"] = None
        elif broken == "code":
            sent.set_return_code(ReturnCode.EMPTY_RESULT)
        elif broken == "beside":
            sent["more"] = 1
        elif broken == "unknown":
            sent = message({**tensors, "other": np.ones(2)})
        elif broken == "shape":
            sent = message({**tensors, first: np.ones((1, 1))})
        elif broken == "nan":
            sent = message({**tensors, first: np.full_like(tensors[first], np.nan)})
        blocks(VettingFilter(site, "lenet_dlg", SHAPE), sent, task)
        (line,) = lines()
        assert line["outcome"] == "withheld"
        assert line["reasons"][0]

    def test_what_is_no_message_at_all(self, site: str, task: FLContext) -> None:
        blocks(VettingFilter(site, "lenet_dlg", SHAPE), {"weights": 1}, task)

    def test_a_site_without_a_place_for_its_log_takes_no_part(
        self, tmp_path: Path, task: FLContext, net: GlobalModel
    ) -> None:
        (tmp_path / "file").write_text("in the way")
        blocks(VettingFilter(str(tmp_path / "file"), "lenet_dlg", SHAPE), message(net.parameters), task)

    @pytest.mark.parametrize(
        ("changed", "said"),
        [({"folder": ""}, "folder"), ({"guard": {"withold": "leaks"}}, "withold"), ({"withheld": 0}, "withheld"),
         ({"image_shape": []}, "image_shape"), ({"model": None}, "model")],
    )  # fmt: skip
    def test_wrong_parameters_end_the_job_before_it_begins(self, site: str, changed: Any, said: str) -> None:
        with pytest.raises(InputError, match=said):
            VettingFilter(**{"folder": site, "model": "lenet_dlg", "image_shape": SHAPE, **changed})

    def test_a_model_that_cannot_be_built_blocks(
        self, site: str, task: FLContext, net: GlobalModel, lines: Any
    ) -> None:
        blocks(VettingFilter(site, "nowhere:Net", SHAPE), message(net.parameters), task)
        assert "nowhere" in lines()[0]["reasons"][0]


class TestGate:
    """The leakage gate."""

    def gate(self, site: str, **changed: Any) -> GateFilter:
        return GateFilter(**{"folder": site, "model": f"{HERE}:net", "image_shape": SHAPE, "images": f"{HERE}:images", "recipe": RECIPE, **changed})  # fmt: skip

    @pytest.mark.parametrize("kind", [DataKind.WEIGHTS, DataKind.WEIGHT_DIFF])
    def test_an_update_that_gives_images_back_is_blocked(
        self, site: str, task: FLContext, dense: nn.Module, batch: Batch, lines: Any, kind: str
    ) -> None:
        sent = dense.state_dict()
        ReceivedFilter(site).process(message(sent), task)
        new = dense_trained(dense, batch)
        if kind == DataKind.WEIGHT_DIFF:
            new = {name: one - sent[name] for name, one in new.items()}
        blocks(self.gate(site), message(new, kind), task)
        assert "images come back" in str(lines()[-1]["reasons"])

    def test_an_update_that_gives_nothing_back_passes_as_it_is(
        self, site: str, task: FLContext, net: GlobalModel, batch: Batch, dense: nn.Module
    ) -> None:
        ReceivedFilter(site).process(message(net.parameters), task)
        new = trained(net, batch)
        passed = self.gate(site, model="lenet_dlg").process(message(new, NUM_STEPS_CURRENT_ROUND=1), task)
        assert all(np.array_equal(arrays(passed)[name], one.numpy()) for name, one in new.items())

    @pytest.mark.parametrize("broken", ["images", "nan", "missing", "unknown", "empty", "received", "kind", "array"])
    def test_what_it_cannot_look_at_is_not_sent(
        self, site: str, task: FLContext, net: GlobalModel, batch: Batch, dense: nn.Module, lines: Any, broken: str
    ) -> None:
        if broken != "received":
            ReceivedFilter(site).process(message(net.parameters), task)
        new: dict[str, Any] = trained(net, batch)
        first = next(iter(new))
        meta: dict[str, Any] = {}
        if broken == "nan":
            new[first] = torch.full_like(new[first], float("nan"))
        elif broken == "missing":
            new.pop(first)
        elif broken == "unknown":
            new["other"] = torch.ones(2)
        elif broken == "empty":
            new = {}
        elif broken == "array":
            meta = {"more": np.ones(3)}
        kind = DataKind.ANALYTIC if broken == "kind" else DataKind.WEIGHTS
        images = f"{HERE}:broken" if broken == "images" else f"{HERE}:images"
        blocks(self.gate(site, model="lenet_dlg", images=images), message(new, kind, **meta), task)
        assert lines()[-1]["outcome"] == "withheld"

    def test_after_too_many_blocked_rounds_the_site_stays_away_in_new_jobs_too(
        self, site: str, task: FLContext, dense: nn.Module, batch: Batch, net: GlobalModel, lines: Any
    ) -> None:
        ReceivedFilter(site).process(message(dense.state_dict()), task)
        new = dense_trained(dense, batch)
        for _ in range(3):
            blocks(self.gate(site), message(new), task)
        blocks(VettingFilter(site, "lenet_dlg", SHAPE), message(net.parameters), task)
        assert "too many rounds" in lines()[-1]["reasons"][0]

    def test_a_damaged_history_does_not_begin_anew(
        self, site: str, task: FLContext, net: GlobalModel, tmp_path: Path
    ) -> None:
        (tmp_path / "site-1").mkdir()
        (tmp_path / "site-1" / "history.json").write_text("[tru")
        blocks(VettingFilter(site, "lenet_dlg", SHAPE), message(net.parameters), task)

    @pytest.mark.parametrize(
        ("changed", "said"),
        [({"recipe": {"batch_size": 0}}, "batch_size"), ({"recipe": {"batches": 2}}, "batches"), ({"images": ""}, "images"),
         ({"guard": {"psnr": -1}}, "psnr"), ({"recipe": {"update": "gradient", "local_steps": 2}}, "gradient")],
    )  # fmt: skip
    def test_wrong_parameters(self, site: str, changed: Any, said: str) -> None:
        with pytest.raises(InputError, match=said):
            self.gate(site, **changed)


class TestDefense:
    """Defenses of updates as a filter."""

    def test_clipping_is_not_ruled_by_the_batch_counter(self, normed: Any, site: str, task: FLContext) -> None:
        before, after = normed
        ReceivedFilter(site).process(message(before), task)
        clip = {"name": "clip", "bound": 0.01}
        found = arrays(DefenseFilter(site, clip).process(message(after), task))
        names = [name for name in before if "running" not in name and "tracked" not in name]
        norm = np.sqrt(sum(np.square(found[name] - before[name].numpy()).sum() for name in names))
        assert norm == pytest.approx(0.01, rel=1e-3)
        assert int(found["1.num_batches_tracked"]) == 50
        assert np.array_equal(found["1.running_mean"], after["1.running_mean"].numpy())

    def test_changes_of_weights_are_clipped_alike(self, normed: Any, site: str, task: FLContext) -> None:
        before, after = normed
        ReceivedFilter(site).process(message(before), task)
        changes = {name: after[name] - before[name] for name in before}
        clip = {"name": "clip", "bound": 0.01}
        passed = DefenseFilter(site, clip).process(message(changes, DataKind.WEIGHT_DIFF), task)
        assert from_shareable(passed).data_kind == DataKind.WEIGHT_DIFF
        found = arrays(passed)
        names = [name for name in before if "running" not in name and "tracked" not in name]
        assert np.sqrt(sum(np.square(found[name]).sum() for name in names)) == pytest.approx(0.01, rel=1e-3)

    def test_noise_is_fresh_and_the_message_itself_is_not_written_into(
        self, normed: Any, site: str, task: FLContext
    ) -> None:
        before, after = normed
        ReceivedFilter(site).process(message(before), task)
        sent = message(after, NUM_STEPS_CURRENT_ROUND=3)
        kept = copy.deepcopy(sent)
        noise = DefenseFilter(site, {"name": "gaussian", "std": 0.5})
        first, second = noise.process(sent, task), noise.process(sent, task)
        assert not np.array_equal(arrays(first)["0.weight"], arrays(second)["0.weight"])
        assert list(sent["DXO"]["meta"]) == list(kept["DXO"]["meta"])
        assert all(np.array_equal(arrays(sent)[name], arrays(kept)[name]) for name in after)
        assert from_shareable(first).meta["NUM_STEPS_CURRENT_ROUND"] == 3
        assert from_shareable(first).get_filter_history() == ["DefenseFilter"]

    @pytest.mark.parametrize("kind", [np.float16, np.float64])
    def test_types_and_names_stay_what_the_job_sends(self, normed: Any, site: str, task: FLContext, kind: Any) -> None:
        before, after = normed
        arrays_after: dict[str, Any] = {name: one.numpy() for name, one in after.items()}
        arrays_after["0.weight"] = arrays_after["0.weight"].astype(kind)
        ReceivedFilter(site).process(message(before), task)
        found = arrays(DefenseFilter(site, {"name": "none"}).process(message(arrays_after), task))
        assert list(found) == list(after)
        assert {name: one.dtype for name, one in found.items()} == {
            name: one.dtype for name, one in arrays_after.items()
        }
        assert np.array_equal(found["0.weight"], arrays_after["0.weight"])

    def test_tensors_of_bfloat16_stay_tensors(self, normed: Any, site: str, task: FLContext) -> None:
        before, after = normed
        after["0.weight"] = after["0.weight"].to(torch.bfloat16)
        ReceivedFilter(site).process(message(before), task)
        found = arrays(DefenseFilter(site, {"name": "gaussian", "std": 0.1}).process(message(after), task))
        assert found["0.weight"].dtype == torch.bfloat16
        assert not torch.equal(found["0.weight"], after["0.weight"])

    @pytest.mark.parametrize("broken", ["unknown", "empty", "integers", "not received", "beside", "header", "code"])
    def test_an_update_that_cannot_be_defended_is_not_sent(
        self, normed: Any, site: str, task: FLContext, lines: Any, broken: str
    ) -> None:
        before, after = normed
        if broken != "not received":
            ReceivedFilter(site).process(message(before), task)
        sent = message(after)
        if broken == "unknown":
            sent = message({**after, "other": torch.ones(3)})
        elif broken == "empty":
            sent = message({})
        elif broken == "integers":
            sent = message({"1.num_batches_tracked": torch.tensor(3)})
        elif broken == "beside":
            sent["raw"] = after["0.weight"].numpy()
        elif broken == "header":
            sent.set_header("raw", after["0.weight"].numpy())
        elif broken == "code":
            sent.set_return_code("SOMETHING_ELSE")
        blocks(DefenseFilter(site, {"name": "clip", "bound": 1.0}), sent, task)
        assert lines()[-1]["outcome"] == "withheld"

    def test_an_answer_with_an_error_code_leaves_without_its_content(
        self, normed: Any, site: str, task: FLContext
    ) -> None:
        _, after = normed
        sent = message(after)
        sent.set_return_code(ReturnCode.EXECUTION_EXCEPTION)
        left = DefenseFilter(site, {"name": "clip"}).process(sent, task)
        assert left == make_reply(ReturnCode.EXECUTION_EXCEPTION)
        stock = PercentilePrivacy(percentile=10, gamma=0.01)
        assert np.array_equal(arrays(stock.process(sent, task))["0.weight"], after["0.weight"].numpy())

    def test_metrics_of_a_validation_leave_if_they_are_plain_numbers(self, site: str, task: FLContext) -> None:
        made = DefenseFilter(site, {"name": "clip"})
        assert arrays(made.process(message({"auc": 0.7}, DataKind.METRICS), task)) == {"auc": 0.7}
        blocks(made, message({"auc": np.ones(40)}, DataKind.METRICS), task)
        blocks(made, message({"auc": list(range(5000))}, DataKind.METRICS), task)

    @pytest.mark.parametrize(
        ("defense", "said"),
        [({"name": "gausian"}, "gaussian"), ({"name": "gaussian", "std": -1}, "std"), ({"name": "dp_sgd"}, "inside training"),
         ("gaussian", "mapping"), ({"compose": []}, "compose")],
    )  # fmt: skip
    def test_wrong_parameters(self, normed: Any, site: str, defense: Any, said: str) -> None:
        with pytest.raises(InputError, match=said):
            DefenseFilter(site, defense)
        stock = PercentilePrivacy(percentile=200, gamma=0.01)
        stock.set_prop(FilterContextKey.CHAIN_TYPE, FilterChainType.TASK_RESULT_CHAIN)
        _, after = normed
        passed = stock.process(message(after), FLContext())
        assert np.array_equal(arrays(passed)["0.weight"], after["0.weight"].numpy()), "FLARE's own fails open"
