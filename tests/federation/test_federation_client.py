"""The client step against plain PyTorch loops with torch.optim, and its derivatives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medpfl.core.domain import Batch, Recipe, Update
from medpfl.core.tasks import MultiLabel, SingleLabel
from medpfl.federation.client import client_step
from medpfl.models import build_model, prepare

CLASSES = 3
SHAPE = (2, 6, 6)

Make = Callable[..., Any]


def torch_optimizer(module: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The same optimizer from torch.optim."""
    rate, decay = recipe.learning_rate, recipe.weight_decay
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(module.parameters(), rate, momentum=recipe.momentum, weight_decay=decay)
    kind = torch.optim.Adam if recipe.optimizer == "adam" else torch.optim.AdamW
    return kind(module.parameters(), rate, betas=recipe.betas, eps=recipe.epsilon, weight_decay=decay)


def plain_training(module: nn.Module, batch: Batch, recipe: Recipe) -> nn.Module:
    """What a client would write without MedPFL."""
    module = copy.deepcopy(module).train(recipe.batch_norm == "train")
    optimizer = torch_optimizer(module, recipe)
    for _ in range(recipe.epochs):
        for step in range(recipe.local_steps):
            begin, end = step * recipe.batch_size, (step + 1) * recipe.batch_size
            optimizer.zero_grad()
            images, targets = batch.images[begin:end], batch.targets[begin:end]
            pieces = list(
                zip(images.tensor_split(recipe.accumulation), targets.tensor_split(recipe.accumulation), strict=True)
            )
            for part_images, part_targets in pieces:
                torch.autograd.backward(nn.functional.cross_entropy(module(part_images), part_targets) / len(pieces))
            if recipe.gradient_clip is not None:
                nn.utils.clip_grad_norm_(module.parameters(), recipe.gradient_clip)
            optimizer.step()
    return module


def assert_same_state(update: Update, module: nn.Module, tolerance: float = 1e-10) -> None:
    """Weights, buffers and counters of the update are those of the module."""
    state = module.state_dict()
    sent = {**update.trainable, **update.buffers, **update.counters}
    assert set(sent) == set(state)
    for name, tensor in sent.items():
        torch.testing.assert_close(tensor, state[name], rtol=tolerance, atol=tolerance, msg=name)


OPTIMIZERS: list[dict[str, Any]] = [
    {"optimizer": "sgd", "learning_rate": 0.1},
    {"optimizer": "sgd", "learning_rate": 0.1, "momentum": 0.9},
    {"optimizer": "sgd", "learning_rate": 0.1, "weight_decay": 0.05},
    {"optimizer": "sgd", "learning_rate": 0.1, "momentum": 0.7, "weight_decay": 0.05},
    {"optimizer": "adam", "learning_rate": 0.01},
    {"optimizer": "adam", "learning_rate": 0.01, "betas": (0.5, 0.9), "epsilon": 1e-3, "weight_decay": 0.1},
    {"optimizer": "adamw", "learning_rate": 0.01},
    {"optimizer": "adamw", "learning_rate": 0.01, "betas": (0.8, 0.99), "weight_decay": 0.3},
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"gradient_clip": 0.2},
    {"accumulation": 2},
    {"accumulation": 3, "gradient_clip": 0.05, "epochs": 2},
]


@pytest.mark.parametrize("batch_norm", ["train", "eval"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_weights_equal_plain_training(
    optimizer: dict[str, Any],
    options: dict[str, Any],
    batch_norm: Any,
    seeded_module: Make,
    global_model: Make,
    data: Make,
) -> None:
    recipe = Recipe(
        update="weights",
        batch_size=4,
        local_steps=3,
        precision="float64",
        batch_norm=batch_norm,
        **optimizer,
        **options,
    )
    module, batch = seeded_module(), data(12)
    update, _ = client_step(global_model(module), batch, recipe)
    assert_same_state(update, plain_training(module, batch, recipe))
    assert update.kind == "weights"
    assert update.examples == 12


def test_last_batch_may_be_smaller(seeded_module: Make, global_model: Make, data: Make) -> None:
    recipe = Recipe(update="weights", batch_size=4, local_steps=3, images=10, precision="float64", batch_norm="train")
    module, batch = seeded_module(), data(10)
    update, _ = client_step(global_model(module), batch, recipe)
    assert_same_state(update, plain_training(module, batch, recipe))


class Running(nn.Module):
    """Batch norm that averages all batches, behind a frozen convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Conv2d(2, 3, 3, bias=False).requires_grad_(False)
        self.norm = nn.BatchNorm2d(3, momentum=None)
        self.fc = nn.Linear(48, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores."""
        scores: Tensor = self.fc(torch.tanh(self.norm(self.frozen(images))).flatten(1))
        return scores


def test_cumulative_statistics_and_frozen_layers(data: Make) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = Running()
    recipe = Recipe(update="weights", batch_size=2, local_steps=3, epochs=2, batch_norm="train", learning_rate=0.1)
    batch = Batch(data(6).images.float(), data(6).targets)
    model = prepare(module, name="running", image_shape=SHAPE, task=SingleLabel(CLASSES))
    update, _ = client_step(model, batch, recipe)
    trained = plain_training(module, batch, recipe).state_dict()
    assert "frozen.weight" not in update.trainable
    assert int(update.counters["norm.num_batches_tracked"]) == 6
    for name, tensor in {**update.trainable, **update.buffers}.items():
        torch.testing.assert_close(tensor, trained[name], rtol=1e-4, atol=1e-6)


def test_delta_is_weights_minus_received_weights(seeded_module: Make, global_model: Make, data: Make) -> None:
    recipe = Recipe(update="delta", batch_size=2, local_steps=2, epochs=2, precision="float64", learning_rate=0.2)
    module, batch = seeded_module(), data(4)
    update, _ = client_step(global_model(module), batch, recipe)
    trained = plain_training(module, batch, recipe)
    for (name, before), after in zip(module.named_parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(update.trainable[name], (after - before).detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("batch_norm", ["train", "eval"])
@pytest.mark.parametrize("clip", [None, 0.1, 1e6])
def test_gradient_equals_backward(
    batch_norm: Any, clip: float | None, seeded_module: Make, global_model: Make, data: Make
) -> None:
    module, batch = seeded_module().train(batch_norm == "train"), data(5)
    model = global_model(module)
    recipe = Recipe(batch_size=5, batch_norm=batch_norm, precision="float64", gradient_clip=clip, weight_decay=0.5)
    update, _ = client_step(model, batch, recipe)
    torch.autograd.backward(nn.functional.cross_entropy(module(batch.images), batch.targets))
    if clip is not None:
        nn.utils.clip_grad_norm_(module.parameters(), clip)
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(update.trainable[name], parameter.grad, rtol=1e-10, atol=1e-12)
    if batch_norm == "train":
        torch.testing.assert_close(update.buffers["norm.running_mean"], module.get_buffer("norm.running_mean"))
        torch.testing.assert_close(update.buffers["norm.running_var"], module.get_buffer("norm.running_var"))
        assert int(update.counters["norm.num_batches_tracked"]) == 1
    else:
        assert not update.buffers
        assert not update.counters


def test_multi_label_gradient_equals_backward(seeded_module: Make, data: Make) -> None:
    module = seeded_module().eval()
    model = prepare(module, name="small", image_shape=SHAPE, task=MultiLabel(CLASSES)).to(torch.float64)
    images, targets = data(3).images, torch.tensor([[1, 0, 1], [0, 0, 0], [1, 1, 0]])
    update, _ = client_step(model, Batch(images, targets), Recipe(batch_size=3, precision="float64"))
    single = prepare(module, name="small", image_shape=SHAPE, task=SingleLabel(CLASSES)).to(torch.float64)
    reference = copy.deepcopy(module)
    reference.load_state_dict({**single.parameters, **single.buffers, **single.counters})
    torch.autograd.backward(nn.functional.binary_cross_entropy_with_logits(reference(images), targets.double()))
    grads = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, gradient in update.trainable.items():
        torch.testing.assert_close(gradient, grads[name], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_autocast_equals_plain_autocast(precision: Any, optimizer: Any, seeded_module: Make, data: Make) -> None:
    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16}[precision]
    module = seeded_module().float()
    module.get_parameter("fc.weight").data.mul_(8.0)
    batch = Batch(data(8).images.float(), data(8).targets)
    recipe = Recipe(
        update="weights",
        batch_size=4,
        local_steps=2,
        epochs=6,
        precision=precision,
        batch_norm="train",
        learning_rate=0.05,
        optimizer=optimizer,
        gradient_clip=1.0,
    )
    model = prepare(module, name="small", image_shape=SHAPE, task=SingleLabel(CLASSES))
    update, _ = client_step(model, batch, recipe)

    plain = copy.deepcopy(module).train()
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "float16")
    stepper = torch_optimizer(plain, recipe)
    skipped = 0
    for _ in range(recipe.epochs):
        for begin in (0, 4):
            stepper.zero_grad()
            with torch.autocast("cpu", dtype=dtype):
                loss = nn.functional.cross_entropy(
                    plain(batch.images[begin : begin + 4]), batch.targets[begin : begin + 4]
                )
            torch.autograd.backward(scaler.scale(loss))
            scaler.unscale_(stepper)
            nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
            before = scaler.get_scale()
            scaler.step(stepper)
            scaler.update()
            skipped += scaler.get_scale() < before
    assert (skipped > 0) == (precision == "float16")
    assert_same_state(update, plain, tolerance=1e-4 if optimizer == "sgd" else 2e-3)  # Adam enlarges rounding
    exact, _ = client_step(model, batch, Recipe(**{**vars(recipe), "precision": "float32"}))
    assert max((exact.trainable[n] - update.trainable[n]).abs().max().item() for n in exact.trainable) > 1e-5


def test_float16_gradient_is_finite_and_near_float32() -> None:
    model = build_model(
        "lenet_dlg", image_shape=(1, 16, 16), task=SingleLabel(4), generator=torch.Generator().manual_seed(0)
    )
    batch = Batch(torch.rand((1, 1, 16, 16), generator=torch.Generator().manual_seed(1)), torch.tensor([2]))
    exact, _ = client_step(model, batch, Recipe())
    half, _ = client_step(model, batch, Recipe(precision="float16"))
    for name, gradient in half.trainable.items():
        assert gradient.dtype == torch.float32
        assert (gradient - exact.trainable[name]).norm() <= 0.05 * exact.trainable[name].norm() + 1e-4


def cubes(tensors: Iterable[Tensor]) -> Tensor:
    """A scalar that depends on every entry nonlinearly."""
    return torch.stack([(tensor**3).sum() for tensor in tensors]).sum()


def test_gradient_of_gradient_agrees_with_autograd(seeded_module: Make, global_model: Make, data: Make) -> None:
    module, batch = seeded_module(), data(3)
    model = global_model(module)
    images = batch.images.clone().requires_grad_()
    update, _ = client_step(
        model, Batch(images, batch.targets), Recipe(batch_size=3, precision="float64", batch_norm="train")
    )
    ours = torch.autograd.grad(cubes(update.trainable.values()), images)[0]

    again = batch.images.clone().requires_grad_()
    loss = nn.functional.cross_entropy(module.train()(again), batch.targets)
    gradients = torch.autograd.grad(loss, list(module.parameters()), create_graph=True)
    expected = torch.autograd.grad(cubes(gradients), again)[0]
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("options", OPTIMIZERS, ids=str)
def test_training_is_differentiable_in_the_images(
    options: dict[str, Any], seeded_module: Make, global_model: Make, data: Make
) -> None:
    batch = data(4)
    model = global_model(seeded_module())
    recipe = Recipe(
        update="delta",
        batch_size=2,
        local_steps=2,
        precision="float64",
        batch_norm="train",
        gradient_clip=0.3,
        **options,
    )

    def measure(images: Tensor) -> Tensor:
        update, _ = client_step(model, Batch(images, batch.targets), recipe)
        return torch.stack([(t * 10).square().sum() for t in update.trainable.values()]).sum()

    images = batch.images.clone().requires_grad_()
    slope = torch.autograd.grad(measure(images), images)[0]
    direction = torch.randn(images.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    step = 1e-6
    with torch.no_grad():
        finite_difference = (measure(images + step * direction) - measure(images - step * direction)) / (2 * step)
    torch.testing.assert_close((slope * direction).sum(), finite_difference, rtol=2e-4, atol=1e-8)


def test_adam_stays_differentiable_where_a_gradient_is_zero(data: Make) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(72, 4), nn.ReLU(), nn.Linear(4, CLASSES))
    with torch.no_grad():
        module.get_parameter("1.bias").fill_(-100.0)
    model = prepare(module, name="dead", image_shape=SHAPE, task=SingleLabel(CLASSES))
    images = data(1).images.float().requires_grad_()
    update, _ = client_step(model, Batch(images, torch.tensor([0])), Recipe(update="delta", optimizer="adam"))
    total = torch.stack([t.sum() for t in update.trainable.values()]).sum()
    assert bool(torch.isfinite(torch.autograd.grad(total, images)[0]).all())


@pytest.mark.parametrize("images", [12, 10])
def test_a_shuffling_client_takes_a_new_order_every_epoch(
    images: int, seeded_module: Make, global_model: Make, data: Make
) -> None:
    recipe = Recipe(
        update="weights", batch_size=4, local_steps=3, epochs=3, images=images, precision="float64", momentum=0.5
    )
    module, batch = seeded_module(), data(images)
    found, _ = client_step(
        global_model(module), batch, replace(recipe, shuffle=True), generator=torch.Generator().manual_seed(7)
    )
    generator = torch.Generator().manual_seed(7)
    orders = [torch.randperm(images, generator=generator) for _ in range(3)]
    optimizer = torch.optim.SGD(module.parameters(), lr=recipe.learning_rate, momentum=0.5)
    module.eval()
    for order in orders:
        for chosen in torch.split(order, 4):
            optimizer.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(module(batch.images[chosen]), batch.targets[chosen]))
            optimizer.step()
    assert_same_state(found, module)
    assert len({tuple(order.tolist()) for order in orders}) > 1
    steps = [chosen for order in orders for chosen in torch.split(order, 4)]
    told, _ = client_step(global_model(seeded_module()), batch, recipe, steps=steps)
    assert_same_state(told, module)
    in_order, _ = client_step(global_model(seeded_module()), batch, recipe)
    assert any(not torch.equal(in_order.trainable[name], found.trainable[name]) for name in found.trainable)


def test_simulated_clients_may_take_other_images_in_every_epoch(
    seeded_module: Make, global_model: Make, data: Make
) -> None:
    """Two epochs over images of their own are two steps of one epoch over all of them, also under vmap."""
    model, batch = global_model(seeded_module(norm=False)), data(4)
    apart = Recipe(update="delta", batch_size=2, epochs=2, precision="float64", learning_rate=0.1)
    steps = [torch.tensor([0, 1]), torch.tensor([2, 3])]
    together = Recipe(update="delta", batch_size=2, local_steps=2, precision="float64", learning_rate=0.1)
    expected, _ = client_step(model, batch, together)

    def simulate(images: Tensor) -> dict[str, Tensor]:
        update, _ = client_step(model, Batch(images, batch.targets), apart, steps=steps)
        return dict(update.trainable)

    found = torch.func.vmap(simulate)(torch.stack([batch.images, batch.images.flip(0)]))
    for name, tensor in expected.trainable.items():
        torch.testing.assert_close(found[name][0], tensor)
