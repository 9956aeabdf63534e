"""Messages as a Flower client receives them, without any server."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch

from medpfl.core.domain import Batch, GlobalModel
from medpfl.core.tasks import SingleLabel
from medpfl.models import build_model

Instruct = Callable[..., Any]


@contextlib.contextmanager
def identified(task: int, run: int, node: int) -> Iterator[None]:
    """Messages need a process that knows whose it is; the oldest Flower asks nobody."""
    try:
        from flwr.supercore.task_identity import TaskIdentity
    except ImportError:
        yield
        return
    before = TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = task, run, node
    yield
    TaskIdentity._task_id, TaskIdentity._run_id, TaskIdentity._node_id = before


@pytest.fixture
def instruct() -> Iterator[Instruct]:
    """Makes train messages with these tensors and settings, for node 7 in round 1."""
    pytest.importorskip("flwr")
    from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict

    def make(tensors: Mapping[str, Any], config: Mapping[str, Any] | None = None, node: int = 7, **records: Any) -> Any:
        content = RecordDict({"arrays": ArrayRecord(dict(tensors)), "config": ConfigRecord(dict(config or {}))})
        for name, values in records.items():
            content[name] = ConfigRecord(values)
        return Message(content=content, dst_node_id=node, message_type="train")

    with identified(task=1, run=1, node=7):
        yield make


@pytest.fixture
def context() -> Any:
    """A client's memory."""
    pytest.importorskip("flwr")
    from flwr.app import Context, RecordDict

    return Context(run_id=1, node_id=7, node_config={}, state=RecordDict(), run_config={})


@pytest.fixture
def answer() -> Callable[..., Any]:
    """Makes an app that answers with these tensors."""
    pytest.importorskip("flwr")
    from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

    def make(tensors: Mapping[str, Any], examples: int = 8) -> Callable[[Any, Any], Any]:
        def app(message: Any, context: Any) -> Any:
            content = RecordDict(
                {"arrays": ArrayRecord(dict(tensors)), "metrics": MetricRecord({"num-examples": examples, "loss": 0.5})}
            )
            return Message(content, reply_to=message)

        return app

    return make


@pytest.fixture
def net() -> GlobalModel:
    """A small convolutional net."""
    return build_model(
        "lenet_dlg", image_shape=(1, 12, 12), task=SingleLabel(2), generator=torch.Generator().manual_seed(0)
    )


@pytest.fixture
def batch() -> Batch:
    """Sixteen images."""
    images = torch.rand(16, 1, 12, 12, generator=torch.Generator().manual_seed(1))
    return Batch(images, torch.arange(16) % 2)


@pytest.fixture
def normed() -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """State dict of a net with batch norm before a round, and after one that moved every weight by 0.01 in 50 steps."""
    module = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4))
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    after = {name: tensor + 50 if "tracked" in name else tensor + 0.01 for name, tensor in before.items()}
    return before, after
