"""What goes wrong in real Flower federations: training goes on, the recording says what happened and keeps the rest."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg

from medpfl.federation.recording import MemoryStorage, Recorder, read_recording
from medpfl.integrations.flower import DefenseMod, GateMod, RecordingStrategy, VettingMod
from medpfl.integrations.flower.records import tensors_of

STATE = {"w": torch.zeros(3), "steps": torch.tensor(0)}
GOOD = {"w": torch.ones(3), "steps": torch.tensor(5)}


class Lenient(FedAvg):
    """Keeps what node 1 sends, so that the recorder alone meets the faults of node 2."""

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
        for message in replies:
            if message.metadata.src_node_id == 1 and message.has_content():
                return message.content.array_records["arrays"], MetricRecord({})
        return None, MetricRecord({})


class Grid:
    """Two nodes; node 1 answers well, node 2 as `fault` says (None: not at all)."""

    def __init__(self, fault: Callable[[Message], Message | None]) -> None:
        self.fault = fault
        self.asked = 0

    def get_node_ids(self) -> list[int]:
        return [1, 2]

    def get_nodes(self) -> list[Any]:
        raise AttributeError("only numbers of nodes are known")

    def send_and_receive(self, messages: Iterable[Message], **_: Any) -> list[Message]:
        answers = []
        for message in messages:
            self.asked += 1
            message.metadata._message_id = f"m{self.asked}"
            good = message.metadata.dst_node_id == 1
            answer = answered(message, ArrayRecord(dict(GOOD))) if good else self.fault(message)
            answers += [] if answer is None else [answer]
        return answers


def answered(message: Message, arrays: ArrayRecord | None, examples: Any = 4, **others: ArrayRecord) -> Message:
    content = RecordDict({"metrics": MetricRecord({"num-examples": examples})})
    for name, record in {"arrays": arrays, **others}.items():
        if record is not None:
            content[name] = record
    return Message(content, reply_to=message)


def array(data: bytes, dtype: str = "float32", stype: str = "numpy.ndarray") -> ArrayRecord:
    return ArrayRecord({"w": Array(dtype=dtype, shape=(3,), stype=stype, data=data)})


def saved(values: Any) -> bytes:
    from io import BytesIO

    file = BytesIO()
    np.save(file, values, allow_pickle=False)
    return file.getvalue()


def trained(strategy: RecordingStrategy, fault: Callable[[Message], Message | None], rounds: int = 2) -> Any:
    """Runs all rounds by Flower's own `start`; returns the final arrays."""
    result = strategy.start(grid=Grid(fault), initial_arrays=ArrayRecord(dict(STATE)), num_rounds=rounds)
    return result.arrays.to_torch_state_dict()


def recording(storage: Any) -> RecordingStrategy:
    inner = Lenient(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=2, min_available_nodes=2)
    return RecordingStrategy(inner, storage)


HUGE = (
    b"\x93NUMPY\x01\x00v\x00{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000000,), }".ljust(127) + b"\n"
)
FAULTS: dict[str, tuple[Callable[[Message], Message | None], str]] = {
    "died": (lambda message: Message(Error(code=3, reason="the process ended"), reply_to=message), "the process ended"),
    "silent": (lambda _: None, "no answer came"),
    "no arrays": (lambda message: answered(message, None), "one array record is expected, found 0"),
    "two records": (lambda m: answered(m, ArrayRecord(dict(GOOD)), more=ArrayRecord(dict(GOOD))), "expected, found 2"),
    "empty": (lambda message: answered(message, ArrayRecord()), "holds no tensor"),
    "rubbish": (lambda message: answered(message, array(b"rubbish")), "'w' of the message cannot be read"),
    "nothing": (lambda message: answered(message, array(b"")), "cannot be read"),
    "an archive": (lambda message: answered(message, array(b"PK\x03\x04 and no more")), "cannot be read"),
    "a pickle": (lambda message: answered(message, array(b"\x80\x04K\x01.")), "cannot be read"),
    "half": (lambda message: answered(message, array(saved(np.ones(3))[:-5])), "cannot be read"),
    "huge": (lambda message: answered(message, array(HUGE)), "cannot be read"),
    "another serialization": (lambda message: answered(message, array(b"x", stype="other")), "cannot be read"),
    "bfloat16 in bytes": (lambda message: answered(message, array(saved(np.zeros(3, "V2")), "bfloat16")), "cannot be read"),
    "words": (lambda message: answered(message, array(saved(np.array(["a", "b"])))), "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_client_that_fails_is_named_and_training_goes_on(instruct: Any, tmp_path: Path, name: str) -> None:
    fault, says = FAULTS[name]
    final = trained(recording(tmp_path / "r"), fault)
    assert torch.equal(final["w"], GOOD["w"])
    found = read_recording(tmp_path / "r")
    assert [(update.round, update.client) for update in found.updates] == [(1, "1"), (2, "1")]
    assert [says in problem and "client 2" in problem for problem in found.problems] == [True, True]
    Recorder(tmp_path / "r").close()  # the first one has let it go


@pytest.mark.parametrize(
    ("tensors", "name"),
    [
        ({"nobody.knows.this": torch.ones(2)}, "nobody.knows.this"),
        ({"w": torch.ones(3, dtype=torch.int16)}, "w"),
        ({"w": torch.ones(3, dtype=torch.float16)}, "w"),
        ({"w": torch.full((3,), float("nan"))}, "w"),
        ({"w": torch.tensor(5)}, "w"),
    ],
)
def test_odd_tensors_are_recorded_as_they_came(instruct: Any, tensors: dict[str, torch.Tensor], name: str) -> None:
    trained(recording(storage := MemoryStorage()), lambda message: answered(message, ArrayRecord(dict(tensors))))
    odd = [update for update in read_recording(storage).updates if update.client == "2"]
    assert len(odd) == 2
    assert odd[0].tensors[name].dtype == tensors[name].dtype
    assert torch.equal(odd[0].tensors[name].nan_to_num(7.0), tensors[name].nan_to_num(7.0))


@pytest.mark.parametrize("examples", [float("inf"), float("nan"), -3, 0, [1, 2]])
def test_numbers_of_images_that_are_none(instruct: Any, examples: Any) -> None:
    trained(recording(storage := MemoryStorage()), lambda message: answered(message, ArrayRecord(dict(GOOD)), examples))
    assert {update.examples for update in read_recording(storage).updates if update.client == "2"} == {None}


def test_a_folder_in_which_somebody_else_records(
    instruct: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Recorder(tmp_path / "r") as first:
        final = trained(recording(tmp_path / "r"), lambda message: answered(message, ArrayRecord(dict(GOOD))))
        first.received(7, "mine", GOOD)
    assert torch.equal(final["w"], GOOD["w"])
    assert "another recorder" in caplog.text
    assert [update.client for update in read_recording(tmp_path / "r").updates] == ["mine"]


def test_a_recorder_that_breaks_down_in_a_way_that_nobody_thought_of(
    instruct: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    strategy = recording(tmp_path / "r")
    write, count = strategy.recorder._storage.write, [0]

    def breaks(name: str, content: bytes) -> None:
        count[0] += 1
        if count[0] > 3:
            raise ZeroDivisionError("whatever")
        write(name, content)

    monkeypatch.setattr(strategy.recorder._storage, "write", breaks)
    with caplog.at_level(logging.WARNING):
        final = trained(strategy, lambda message: answered(message, ArrayRecord({"w": torch.rand(3)})), rounds=3)
    assert torch.equal(final["w"], GOOD["w"])
    assert "broke down" in caplog.text
    found = read_recording(tmp_path / "r")
    assert len(found.updates) == 2
    assert any("ZeroDivisionError" in problem for problem in found.problems)


def test_a_server_that_raises_leaves_all_that_came_before(instruct: Any, tmp_path: Path) -> None:
    def fault(message: Message) -> Message:
        if int(message.content["config"]["server-round"]) == 3:
            raise ConnectionError("the grid is gone")
        return answered(message, ArrayRecord(dict(GOOD)))

    with pytest.raises(ConnectionError):
        trained(recording(tmp_path / "r"), fault, rounds=4)
    assert read_recording(tmp_path / "r").rounds == (1, 2)


@pytest.mark.parametrize("data", [b"rubbish", b"", b"PK\x03\x04", HUGE, saved(np.zeros(3, "V2"))])
def test_mods_end_the_round_on_a_message_that_cannot_be_read(
    instruct: Any, context: Any, answer: Any, net: Any, batch: Any, data: bytes
) -> None:
    from medpfl.core.domain import Recipe
    from medpfl.defenses import Clip

    message = instruct(net.parameters)
    message.content["arrays"] = array(data)
    recipe = Recipe(update="weights", batch_size=16)
    for mod in (VettingMod(net), GateMod(net, lambda _: batch, recipe), DefenseMod(Clip(bound=1.0))):
        called: list[int] = []
        reply = mod(message, context, lambda *_, called=called: called.append(1))
        assert reply.error.reason == "withheld"
        assert not called
    for mod in (GateMod(net, lambda _: batch, recipe), DefenseMod(Clip(bound=1.0))):
        bad = lambda asked, _: answered(asked, array(data))  # noqa: E731
        assert mod(instruct(net.parameters), context, bad).error.reason == "withheld"


def test_arrays_of_integers_and_in_the_order_of_fortran_are_read() -> None:
    record = ArrayRecord({"w": Array(np.asfortranarray(np.arange(6, dtype=np.int32).reshape(2, 3)))})
    assert torch.equal(tensors_of(record)["w"], torch.arange(6, dtype=torch.int32).reshape(2, 3))


def test_settings_that_differ_between_clients_stay_with_their_client(instruct: Any) -> None:
    class Individual(Lenient):
        def configure_train(self, *arguments: Any) -> Iterable[Message]:
            messages = list(super().configure_train(*arguments))
            for message in messages:
                own = ConfigRecord({"steps": int(message.metadata.dst_node_id)})
                message.content = RecordDict({**dict(message.content), "config": own})
            return messages

    inner = Individual(fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=2, min_available_nodes=2)
    strategy = RecordingStrategy(inner, storage := MemoryStorage())
    trained(strategy, lambda message: answered(message, ArrayRecord(dict(GOOD))), rounds=1)
    found = read_recording(storage)
    told = {update.client: found.sent_to(update) for update in found.updates}
    assert {client: one.config["steps"] for client, one in told.items() if one is not None} == {"1": 1, "2": 2}


def test_behind_secure_aggregation_a_full_disk_stops_no_training_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from flwr.common import Code, FitRes, Status, ndarrays_to_parameters

    from medpfl.core.errors import StoreError
    from medpfl.integrations.flower.secagg import AGGREGATE, RecordingFedAvg

    recorder = Recorder(tmp_path / "r")
    strategy = RecordingFedAvg(recorder, ["w"])
    mean = ndarrays_to_parameters([np.ones(3, dtype=np.float32)])
    results = [(None, FitRes(Status(Code.OK, ""), mean, examples, {})) for examples in (4, 6)]
    first, _ = strategy.aggregate_fit(1, results, [ConnectionError("one client is gone")])

    def full(*_: Any) -> None:
        raise StoreError("no space left")

    monkeypatch.setattr(recorder._storage, "write", full)
    second, _ = strategy.aggregate_fit(2, results, [])
    assert first is not None
    assert second is not None
    assert "no space left" in caplog.text
    recorder.close()
    found = read_recording(tmp_path / "r")
    assert [(update.round, update.client, update.examples) for update in found.updates] == [(1, AGGREGATE, 10)]
    assert any("one client is gone" in problem for problem in found.problems)
