"""The recorder around Flower's strategies, driven round by round without a server."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr")

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg

from medpfl.core.errors import StoreError
from medpfl.federation.recording import MemoryStorage, read_recording
from medpfl.integrations.flower import CraftedStrategy, RecordingStrategy

NODES = [11, 2**64 - 5, 33]


class Grid:
    """Three nodes; sends nothing."""

    def get_node_ids(self) -> Iterable[int]:
        return NODES


def averaging() -> FedAvg:
    return FedAvg(fraction_train=1.0, min_train_nodes=3, min_available_nodes=3)


def rounds(strategy: Any, instruct: Any, answer: Any, count: int = 2, answers: Any = None) -> dict[str, torch.Tensor]:
    """Plays rounds: node i adds i + 1 to every weight."""
    state = {"w": torch.zeros(3), "n.num_batches_tracked": torch.tensor(0)}
    for number in range(1, count + 1):
        messages = list(strategy.configure_train(number, ArrayRecord(state), ConfigRecord({"lr": 0.1}), Grid()))
        replies = []
        for place, message in enumerate(messages):
            message.metadata._message_id = f"m{number}-{place}"
            received = dict(message.content.array_records["arrays"].to_torch_state_dict())
            made = {name: tensor + place + 1 for name, tensor in received.items()}
            chosen = answers(place, made) if answers else made
            replies.append(chosen if isinstance(chosen, Message) else answer(chosen, 4)(message, None))
        arrays, _ = strategy.aggregate_train(number, replies)
        if arrays is not None:
            state = dict(arrays.to_torch_state_dict())
    if isinstance(strategy, RecordingStrategy):
        strategy.wait()
    return state


def test_what_is_sent_and_answered_is_recorded_and_training_is_as_without(instruct: Any, answer: Any) -> None:
    plain = rounds(averaging(), instruct, answer)
    recorded = rounds(RecordingStrategy(averaging(), storage := MemoryStorage()), instruct, answer)
    assert all(torch.equal(plain[name], recorded[name]) for name in plain)
    recording = read_recording(storage)
    assert recording.rounds == (1, 2)
    assert {update.client for update in recording.updates} == {str(node) for node in NODES}
    assert {update.examples for update in recording.updates} == {4}
    for update in recording.updates:
        sent = recording.sent_to(update)
        assert sent is not None
        assert sent.config["lr"] == 0.1
        added = update.tensors["w"] - sent.tensors["w"]
        assert len(set(added.tolist())) == 1
        assert update.config == {"loss": 0.5}
    assert [sorted(float(u.tensors["w"][0]) for u in recording.updates if u.round == 1)] == [[1.0, 2.0, 3.0]]


def test_it_goes_around_differential_privacy(instruct: Any, answer: Any) -> None:
    private = DifferentialPrivacyServerSideFixedClipping(averaging(), 0.1, 1.0, 3)
    rounds(RecordingStrategy(private, storage := MemoryStorage()), instruct, answer, count=1)
    assert len(read_recording(storage).updates) == 3


def test_a_client_that_dies_or_withholds_is_a_line_of_the_log(instruct: Any, answer: Any) -> None:
    from medpfl.integrations.flower.records import refused

    def answers(place: int, made: Any) -> Any:
        return refused(instruct(made, node=NODES[0])) if place == 0 else made

    strategy = RecordingStrategy(averaging(), storage := MemoryStorage())
    rounds(strategy, instruct, answer, count=1, answers=answers)
    recording = read_recording(storage)
    assert len(recording.updates) == 2
    assert any("withheld" in problem for problem in recording.problems)


def test_a_full_disk_ends_the_recording_and_not_the_training(
    instruct: Any, answer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strategy = RecordingStrategy(averaging(), tmp_path / "r")

    def full(*_: Any) -> None:
        raise StoreError("no space left")

    monkeypatch.setattr(strategy.recorder._storage, "write", full)
    state = rounds(strategy, instruct, answer)
    assert float(state["w"][0]) == pytest.approx(4.0)
    assert "no space left" in strategy.recorder.stopped


def test_crafted_parameters_go_to_their_node_only(instruct: Any, answer: Any) -> None:
    def craft(number: int, node: int, tensors: Any) -> Any:
        return {**tensors, "w": torch.full((3,), 9.0)} if node == NODES[0] else None

    strategy = RecordingStrategy(CraftedStrategy(averaging(), craft), storage := MemoryStorage())
    rounds(strategy, instruct, answer, count=1)
    recording = read_recording(storage)
    sent = {update.client: recording.sent_to(update) for update in recording.updates}
    assert {client: float(one.tensors["w"][0]) for client, one in sent.items() if one is not None} == {
        str(NODES[0]): 9.0, str(NODES[1]): 0.0, str(NODES[2]): 0.0,
    }  # fmt: skip
