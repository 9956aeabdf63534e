"""The example's ground truth: which node held which images is found from the updates alone, noise or not."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medpfl.federation.recording import About, Recorder

EXAMPLE = Path(__file__).parents[2] / "examples" / "flower"
TOLD = {"data": "", "images": 4, "batch-size": 2, "local-steps": 2, "learning-rate": 0.1, "seed": 3, "clients": 3}
NODES = {"9": 0, "4": 2, "7": 1}


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any]:
    """The example's modules `brain.task` and `truth`."""
    monkeypatch.syspath_prepend(str(EXAMPLE))
    return importlib.import_module("brain.task"), importlib.import_module("truth")


def answers(task: Any, sent: dict[str, torch.Tensor], number: int, noise: float) -> dict[str, dict[str, torch.Tensor]]:
    """What every node sends back in a round."""
    found = {}
    for node, partition in NODES.items():
        model = task.initial_model()
        model.load_state_dict(sent)
        images, labels = task.round_images(*task.client_images("", partition, 4, 3), number, 4)
        task.train(model, images, labels, 2, 0.1)
        found[node] = {name: one + noise * torch.randn(one.shape) for name, one in model.state_dict().items()}
    return found


@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_nodes_get_the_images_that_they_trained_on(example: tuple[Any, Any], tmp_path: Path, noise: float) -> None:
    task, truth = example
    torch.manual_seed(5)
    sent = task.initial_model().state_dict()
    with Recorder(tmp_path / "run", About()) as recorder:
        for number in (1, 2, 3, 4):
            recorder.sent(number, sent)
            for node, state in answers(task, sent, number, noise).items():
                recorder.received(number, node, state, examples=4)
    truth.write_truth(tmp_path / "run", TOLD)
    for node, partition in NODES.items():
        own, _ = task.client_images("", partition, 4, 3)
        assert np.array_equal(np.load(tmp_path / "run-truth" / f"{node}-round-1.npz")["images"], own.numpy())


def test_an_aggregate_has_the_images_of_all_clients(example: tuple[Any, Any], tmp_path: Path) -> None:
    task, truth = example
    sent = task.initial_model().state_dict()
    with Recorder(tmp_path / "run", About(channel="secagg_plus")) as recorder:
        recorder.sent(1, sent)
        recorder.received(1, "aggregate", sent, examples=12, config={"clients": 3})
    truth.write_truth(tmp_path / "run", TOLD)
    held = np.load(tmp_path / "run-truth" / "aggregate-round-1.npz")["images"]
    expected = torch.cat([task.client_images("", partition, 4, 3)[0] for partition in range(3)])
    assert np.array_equal(held, expected.numpy())


def test_the_server_owns_no_image_of_a_client(example: tuple[Any, Any]) -> None:
    task, _ = example
    own = {image.numpy().tobytes() for image in task.held_out("", 3)[0]}
    theirs = {image.numpy().tobytes() for client in range(3) for image in task.client_images("", client, 4, 3)[0]}
    assert len(theirs) == 12
    assert not own & theirs
