"""What an app may try to send beside an update, and what of it leaves a site."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict

from medpfl.integrations.flower import AnswersMod, AuditLog

STATE = {"w": torch.zeros(3, 2), "n": torch.tensor(0)}
NEW = {"w": torch.ones(3, 2), "n": torch.tensor(4)}
SECRET = b"a patient's image"


def answer(message: Any, **records: Any) -> Any:
    content = {"arrays": ArrayRecord(dict(NEW)), "metrics": MetricRecord({"num-examples": 8, "loss": 0.5})}
    return Message(RecordDict({name: one for name, one in {**content, **records}.items() if one}), reply_to=message)


def hidden_behind() -> ArrayRecord:
    record = ArrayRecord(dict(NEW))
    plain = record["w"]
    record["w"] = Array(dtype=plain.dtype, shape=plain.shape, stype=plain.stype, data=plain.data + SECRET)
    return record


def test_an_update_and_a_few_numbers_leave(instruct: Any, context: Any) -> None:
    reply = AnswersMod()(instruct(STATE), context, lambda message, _: answer(message))
    assert reply.content["metrics"] == {"num-examples": 8, "loss": 0.5}
    found = reply.content["arrays"].to_torch_state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in NEW.items())


def test_bytes_behind_an_array_stay(instruct: Any, context: Any) -> None:
    reply = AnswersMod()(instruct(STATE), context, lambda message, _: answer(message, arrays=hidden_behind()))
    assert SECRET not in reply.content["arrays"]["w"].data
    assert torch.equal(reply.content["arrays"].to_torch_state_dict()["w"], NEW["w"])


@pytest.mark.parametrize(
    "records",
    [
        {"config": ConfigRecord({"x": SECRET})},
        {"config": ConfigRecord({"x": [SECRET]})},
        {"config": ConfigRecord({"x": "y" * 600})},
        {"config": ConfigRecord({"y" * 600: 1})},
        {"y" * 600: ConfigRecord({"x": 1})},
        {"images": MetricRecord({"x": [0.5] * 100})},
        {"more": ArrayRecord(dict(NEW))},
        {"arrays": None},
        {"arrays": ArrayRecord({**NEW, "images": torch.ones(2)})},
        {"arrays": ArrayRecord({**NEW, "w": torch.ones(300, 2)})},
        {"arrays": ArrayRecord({**NEW, "w": torch.ones(3, 2, dtype=torch.float64)})},
    ],
)
def test_everything_else_is_withheld(instruct: Any, context: Any, tmp_path: Path, records: Any) -> None:
    mod = AnswersMod(log=AuditLog(tmp_path / "log.jsonl"))
    reply = mod(instruct(STATE), context, lambda message, _: answer(message, **records))
    assert reply.error.reason == "withheld"
    assert json.loads((tmp_path / "log.jsonl").read_text())["decided_by"] == "answers"


def test_neither_errors_nor_evaluations_nor_queries_carry_anything(instruct: Any, context: Any) -> None:
    def raises(*_: Any) -> Any:
        raise ValueError(SECRET)

    said = Error(code=1, reason=str(SECRET))
    for app in (raises, lambda message, _: Message(said, reply_to=message)):
        assert AnswersMod()(instruct(STATE), context, app).error.reason == "withheld"
    evaluation, query = instruct(STATE), instruct(STATE)
    evaluation.metadata.message_type, query.metadata.message_type = "evaluate", "query"
    passed = AnswersMod()(evaluation, context, lambda message, _: answer(message, arrays=None))
    assert passed.content["metrics"]["loss"] == 0.5
    assert AnswersMod()(evaluation, context, lambda message, _: answer(message)).has_error()
    assert AnswersMod()(query, context, lambda *_: pytest.fail("answered")).has_error()
