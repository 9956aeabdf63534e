"""The client step against plain PyTorch loops with torch.optim."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medpfl.core.domain import Batch, ClientState, GlobalModel, Recipe, Update
from medpfl.core.errors import ModelError, SpecError
from medpfl.core.tasks import MultiLabel, SingleLabel
from medpfl.federation.client import client_step
from medpfl.federation.hooks import Hooks
from medpfl.models import build_model, prepare

CLASSES = 3
SHAPE = (2, 6, 6)


class SmallNet(nn.Module):
    """Convolution, batch norm, smooth activation, dense layer."""

    def __init__(self, norm: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, bias=not norm)  # before batch norm a bias has no gradient
        self.norm: nn.Module = nn.BatchNorm2d(4, momentum=0.3) if norm else nn.Identity()
        self.fc = nn.Linear(4 * 36, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores."""
        scores: Tensor = self.fc(torch.tanh(self.norm(self.conv(images))).flatten(1))
        return scores


def seeded_module(norm: bool = True) -> nn.Module:
    """A float64 module whose batch norm has non-trivial running statistics."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        module = SmallNet(norm).double()
        if isinstance(module.norm, nn.BatchNorm2d):
            module.norm.running_mean = torch.rand(4, dtype=torch.float64)
            module.norm.running_var = torch.rand(4, dtype=torch.float64) + 0.5
            nn.init.uniform_(module.norm.weight, 0.5, 1.5)
    return module


def global_model(module: nn.Module) -> GlobalModel:
    """The module as a global model that keeps its float64 values."""
    model = prepare(module, name="small", image_shape=SHAPE, task=SingleLabel(CLASSES))
    exact = dict(module.named_parameters()) | dict(module.named_buffers())
    model = model.to(torch.float64)
    for group in (model.parameters, model.buffers):
        for name in group:
            group[name].copy_(exact[name].detach())
    return model


def data(count: int) -> Batch:
    """Random images with labels."""
    generator = torch.Generator().manual_seed(count)
    images = torch.rand((count, *SHAPE), dtype=torch.float64, generator=generator)
    return Batch(images, torch.randint(0, CLASSES, (count,), generator=generator))


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
def test_weights_equal_plain_training(optimizer: dict[str, Any], options: dict[str, Any], batch_norm: Any) -> None:
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


def test_last_batch_may_be_smaller() -> None:
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


def test_cumulative_statistics_and_frozen_layers() -> None:
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


def test_delta_is_weights_minus_received_weights() -> None:
    recipe = Recipe(update="delta", batch_size=2, local_steps=2, epochs=2, precision="float64", learning_rate=0.2)
    module, batch = seeded_module(), data(4)
    update, _ = client_step(global_model(module), batch, recipe)
    trained = plain_training(module, batch, recipe)
    for (name, before), after in zip(module.named_parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(update.trainable[name], (after - before).detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("batch_norm", ["train", "eval"])
@pytest.mark.parametrize("clip", [None, 0.1, 1e6])
def test_gradient_equals_backward(batch_norm: Any, clip: float | None) -> None:
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


def test_multi_label_gradient_equals_backward() -> None:
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
def test_autocast_equals_plain_autocast(precision: Any, optimizer: Any) -> None:
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


def test_gradient_of_gradient_agrees_with_autograd() -> None:
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
def test_training_is_differentiable_in_the_images(options: dict[str, Any]) -> None:
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


def test_adam_stays_differentiable_where_a_gradient_is_zero() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(72, 4), nn.ReLU(), nn.Linear(4, CLASSES))
    with torch.no_grad():
        module.get_parameter("1.bias").fill_(-100.0)
    model = prepare(module, name="dead", image_shape=SHAPE, task=SingleLabel(CLASSES))
    images = data(1).images.float().requires_grad_()
    update, _ = client_step(model, Batch(images, torch.tensor([0])), Recipe(update="delta", optimizer="adam"))
    total = torch.stack([t.sum() for t in update.trainable.values()]).sum()
    assert bool(torch.isfinite(torch.autograd.grad(total, images)[0]).all())


def test_clients_can_be_batched() -> None:
    model = global_model(seeded_module())
    recipe = Recipe(
        update="weights",
        batch_size=2,
        local_steps=2,
        optimizer="adam",
        batch_norm="train",
        precision="float64",
        gradient_clip=0.5,
        accumulation=2,
    )
    images = data(12).images.reshape(3, 4, *SHAPE)
    targets = data(12).targets.reshape(3, 4)

    def sent(images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        update, _ = client_step(model, Batch(images, targets), recipe)
        return {**update.trainable, **update.buffers}

    batched = torch.func.vmap(sent)(images, targets)
    for client in range(3):
        for name, tensor in sent(images[client], targets[client]).items():
            torch.testing.assert_close(batched[name][client], tensor, rtol=1e-9, atol=1e-11)


def test_clients_with_their_own_models_can_be_batched() -> None:
    models = [global_model(seeded_module()), global_model(seeded_module())]
    for tensor in models[1].parameters.values():
        tensor.mul_(1.5)
    stacked = {name: torch.stack([m.parameters[name] for m in models]) for name in models[0].parameters}
    batch, recipe = data(2), Recipe(batch_size=2, precision="float64")

    def sent(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        update, _ = client_step(replace(models[0], parameters=parameters), batch, recipe)
        return dict(update.trainable)

    batched = torch.func.vmap(sent)(stacked)
    for index, model in enumerate(models):
        for name, tensor in client_step(model, batch, recipe)[0].trainable.items():
            torch.testing.assert_close(batched[name][index], tensor, rtol=1e-10, atol=1e-12)


def test_nothing_of_the_caller_changes() -> None:
    module, batch = seeded_module(), data(4)
    model = global_model(module)
    before = [t.clone() for g in (model.parameters, model.buffers, model.counters) for t in g.values()]
    images, state = batch.images.clone(), {name: t.clone() for name, t in module.state_dict().items()}
    random_state = torch.get_rng_state()
    recipe = Recipe(update="weights", batch_size=2, local_steps=2, batch_norm="train", optimizer="adam")
    first, _ = client_step(model, batch, recipe)
    second, _ = client_step(model, batch, recipe)
    after = [t for g in (model.parameters, model.buffers, model.counters) for t in g.values()]
    assert all(torch.equal(one, two) for one, two in zip(before, after, strict=True))
    assert torch.equal(images, batch.images)
    assert all(torch.equal(state[name], tensor) for name, tensor in module.state_dict().items())
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(torch.equal(first.trainable[name], second.trainable[name]) for name in first.trainable)


class Recording(Hooks):
    """Writes down the order in which it is called; clips each example's gradient to norm 1."""

    clips_per_example = True

    def __init__(self) -> None:
        self.calls: list[str] = []

    def model(self, model: GlobalModel) -> GlobalModel:
        self.calls.append("model")
        return model

    def batch(self, batch: Batch, generator: torch.Generator) -> Batch:
        self.calls.append(f"batch {len(batch)}")
        return batch

    def per_example(self, gradients: Any, generator: torch.Generator) -> Any:
        self.calls.append("per_example")
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0)
        factors = torch.clamp(1.0 / norms, max=1.0)
        return {name: torch.einsum("n...,n->...", g, factors) / len(factors) for name, g in gradients.items()}

    def update(self, update: Update, state: ClientState, generator: torch.Generator) -> tuple[Update, ClientState]:
        self.calls.append("update")
        return update, ClientState(state.rounds, {"memory": torch.ones(1)})


def test_hooks_run_in_the_stated_order_and_clip_each_example() -> None:
    hooks = Recording()
    module, batch = seeded_module(norm=False), data(4)
    recipe = Recipe(update="delta", batch_size=2, local_steps=2, precision="float64", learning_rate=0.1)
    update, state = client_step(global_model(module), batch, recipe, hooks=hooks, state=ClientState(rounds=4))
    assert hooks.calls == ["model", "batch 2", "per_example", "batch 2", "per_example", "update"]
    assert state.rounds == 5
    assert "memory" in state.tensors

    plain = copy.deepcopy(module)
    for begin in (0, 2):
        total = [torch.zeros_like(p) for p in plain.parameters()]
        for index in (begin, begin + 1):
            loss = nn.functional.cross_entropy(plain(batch.images[index : index + 1]), batch.targets[index : index + 1])
            gradients = torch.autograd.grad(loss, list(plain.parameters()))
            norm = torch.cat([g.flatten() for g in gradients]).norm()
            total = [t + g * min(1.0, 1.0 / norm.item()) / 2 for t, g in zip(total, gradients, strict=True)]
        with torch.no_grad():
            for parameter, gradient in zip(plain.parameters(), total, strict=True):
                parameter.sub_(0.1 * gradient)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(
            update.trainable[name], (parameter - module.get_parameter(name)).detach(), rtol=1e-9, atol=1e-12
        )


class Emptying(Hooks):
    """A Poisson sample that happens to be empty."""

    def batch(self, batch: Batch, generator: torch.Generator) -> Batch:
        return Batch(batch.images[:0], batch.targets[:0])


class EmptyingPerExample(Emptying):
    """The same with per-example gradients."""

    clips_per_example = True

    def per_example(self, gradients: Any, generator: torch.Generator) -> Any:
        return {name: gradient.sum(dim=0) for name, gradient in gradients.items()}


@pytest.mark.parametrize("hooks", [Emptying(), EmptyingPerExample()])
def test_an_empty_batch_trains_nothing(hooks: Hooks) -> None:
    update, _ = client_step(global_model(seeded_module()), data(2), Recipe(update="delta", batch_size=2), hooks=hooks)
    assert all(not tensor.any() for tensor in update.trainable.values())
    assert update.examples == 2


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"update": "gradient", "epochs": 2}, "update: gradient"),
        ({"update": "delta", "batch_size": 2, "local_steps": 2, "images": 2}, "images: 2"),
        ({"update": "delta", "batch_size": 2, "images": 5}, "between 1 and 2 images"),
        ({"accumulation": 2}, "accumulation: 2"),
        ({"betas": (0.9, 1.0)}, "betas"),
    ],
)
def test_impossible_recipes_are_refused_with_the_field(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        client_step(global_model(seeded_module()), data(2), Recipe(**settings))


@pytest.mark.parametrize("held", [2, 5])
def test_a_client_must_hold_as_many_images_as_its_local_steps_take(held: int) -> None:
    with pytest.raises(SpecError, match=f"3 to 4 images, but the client holds {held}"):
        client_step(global_model(seeded_module()), data(held), Recipe(update="delta", batch_size=2, local_steps=2))


def test_per_example_gradients_with_batch_statistics_are_refused() -> None:
    with pytest.raises(SpecError, match="batch_norm: eval"):
        client_step(global_model(seeded_module()), data(2), Recipe(batch_size=2, batch_norm="train"), hooks=Recording())


def test_images_of_another_shape_are_refused() -> None:
    with pytest.raises(ModelError, match=r"\(2, 6, 6\).*\(2, 5, 6\)"):
        client_step(global_model(seeded_module()), Batch(torch.rand(1, 2, 5, 6), torch.tensor([0])), Recipe())
