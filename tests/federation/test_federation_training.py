"""Training before an audit: it learns, equals torch.optim, and goes on from a snapshot bit by bit."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from medpfl.core.domain import GlobalModel
from medpfl.core.errors import DataError, ModelError
from medpfl.core.session import State
from medpfl.core.tasks import SingleLabel
from medpfl.federation.training import TrainingConfig, train
from medpfl.models import prepare


def little_model() -> tuple[nn.Module, GlobalModel]:
    """A module with batch norm and its global model."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = nn.Sequential(
            nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(64, 2)
        )
    return module, prepare(module, name="little", image_shape=(1, 6, 6), task=SingleLabel(2))


def two_classes(count: int = 64) -> tuple[Tensor, Tensor]:
    """Images whose left or right half is brighter."""
    generator = torch.Generator().manual_seed(7)
    images = torch.rand((count, 1, 6, 6), generator=generator) * 0.5
    targets = torch.arange(count) % 2
    images[targets == 0, :, :, :3] += 0.5
    images[targets == 1, :, :, 3:] += 0.5
    return images, targets


def seeded(seed: int = 0) -> torch.Generator:
    """A generator."""
    return torch.Generator().manual_seed(seed)


class Snapshots:
    """A session that keeps every snapshot, and starts from one if it is given one."""

    def __init__(self, start: State | None = None) -> None:
        self.start = start
        self.kept: dict[int, State] = {}
        self.totals: set[int] = set()

    def restore(self) -> State | None:
        """Where to go on."""
        return self.start

    def checkpoint(self, done: int, total: int, state: Callable[[], State]) -> None:
        """Keeps a deep copy, as a file would."""
        self.kept[done] = copy.deepcopy(state())
        self.totals.add(total)


def test_training_learns_to_tell_the_classes_apart() -> None:
    _, model = little_model()
    images, targets = two_classes()
    trained, history = train(
        model, images, targets, TrainingConfig(epochs=20, batch_size=16, learning_rate=0.01), seeded()
    )
    output, _ = trained.forward(images)
    assert (output.argmax(dim=1) == targets).double().mean() > 0.95
    assert [step for step, _ in history] == list(range(1, 81))
    assert history[-1][1] < 0.3 * history[0][1]
    assert int(trained.counters["1.num_batches_tracked"]) == 80


def test_one_adam_step_equals_torch() -> None:
    module, model = little_model()
    images, targets = two_classes(32)
    config = TrainingConfig(steps=1, batch_size=32, optimizer="adam", learning_rate=0.01)
    trained, history = train(model, images, targets, config, seeded())
    module.train()
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    loss = nn.functional.cross_entropy(module(images), targets)
    torch.autograd.backward(loss)
    optimizer.step()
    assert [step for step, _ in history] == [1]
    assert history[0][1] == pytest.approx(loss.item(), rel=1e-5)
    for name, tensor in module.state_dict().items():
        ours = {**trained.parameters, **trained.buffers, **trained.counters}[name]
        torch.testing.assert_close(ours, tensor, rtol=1e-4, atol=2e-5)


def test_interrupted_training_ends_in_the_same_bits() -> None:
    _, model = little_model()
    images, targets = two_classes(40)
    config = TrainingConfig(epochs=3, batch_size=8)
    session = Snapshots()
    whole, history = train(model, images, targets, config, seeded(), session)
    assert session.totals == {15}
    for done in (3, 5, 12):
        resumed, again = train(model, images, targets, config, seeded(99), Snapshots(session.kept[done]))
        assert again == history
        for group in ("parameters", "buffers", "counters"):
            for name, tensor in getattr(whole, group).items():
                assert torch.equal(tensor, getattr(resumed, group)[name])


def test_order_follows_the_generator_only() -> None:
    _, model = little_model()
    images, targets = two_classes()
    config = TrainingConfig(epochs=1, batch_size=16)
    first, second, other = (train(model, images, targets, config, seeded(seed))[1] for seed in (0, 0, 1))
    assert first == second
    assert first != other


def test_every_image_is_visited_once_per_epoch() -> None:
    """With weights that never change, the mean loss over an epoch is the mean over all images."""
    images, targets = two_classes(48)
    module = nn.Sequential(nn.Flatten(), nn.Linear(36, 2))
    still = prepare(module, name="still", image_shape=(1, 6, 6), task=SingleLabel(2))
    config = TrainingConfig(epochs=1, batch_size=16, optimizer="sgd", learning_rate=1e-12)
    _, history = train(still, images, targets, config, seeded())
    expected = nn.functional.cross_entropy(module(images), targets).item()
    assert sum(loss for _, loss in history) / 3 == pytest.approx(expected, rel=1e-5)


def test_fewer_images_than_a_batch_make_one_batch() -> None:
    _, model = little_model()
    images, targets = two_classes(5)
    _, history = train(model, images, targets, TrainingConfig(epochs=2, batch_size=32), seeded())
    assert len(history) == 2


def test_no_images_and_divergence_are_said() -> None:
    _, model = little_model()
    images, targets = two_classes()
    with pytest.raises(DataError, match="training part is empty"):
        train(model, images[:0], targets[:0], TrainingConfig(), seeded())
    with pytest.raises(ModelError, match="learning_rate"):
        train(model, images, targets, TrainingConfig(optimizer="sgd", learning_rate=1e38), seeded())


def test_epochs_and_steps_exclude_each_other() -> None:
    with pytest.raises(ValidationError, match="epochs or steps"):
        TrainingConfig(epochs=1, steps=1)
    assert TrainingConfig().total_steps(64) == 10
