"""What surrounds the client step: batched clients, hooks, nothing changed for the caller, refusals."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medpfl.core.domain import Batch, ClientState, GlobalModel, Recipe, Tensors, Update
from medpfl.core.errors import ModelError, SpecError
from medpfl.federation.client import client_step
from medpfl.federation.hooks import Hooks, Step

SHAPE = (2, 6, 6)

Make = Callable[..., Any]


def test_clients_can_be_batched(seeded_module: Make, global_model: Make, data: Make) -> None:
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


def test_clients_with_their_own_models_can_be_batched(seeded_module: Make, global_model: Make, data: Make) -> None:
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


def test_nothing_of_the_caller_changes(seeded_module: Make, global_model: Make, data: Make) -> None:
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

    def steps(self, images: int, recipe: Recipe, generator: torch.Generator) -> None:
        self.calls.append(f"steps {images}")

    def batch(self, batch: Batch, model: GlobalModel, generator: torch.Generator) -> Batch:
        self.calls.append(f"batch {len(batch)}")
        return batch

    def per_example(self, gradients: Any, recipe: Recipe, generator: torch.Generator) -> Any:
        self.calls.append("per_example")
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in gradients.values()]).norm(dim=0)
        factors = torch.clamp(1.0 / norms, max=1.0)
        return {name: torch.einsum("n...,n->...", g, factors) / len(factors) for name, g in gradients.items()}

    def gradient(self, step: Step, generator: torch.Generator) -> Tensors:
        self.calls.append(f"gradient {len(step.batch)}")
        return step.gradients

    def update(
        self, update: Update, model: GlobalModel, state: ClientState, generator: torch.Generator
    ) -> tuple[Update, ClientState]:
        self.calls.append(f"update of {next(iter(model.parameters.values())).dtype}")
        return update, ClientState(state.rounds, {"memory": torch.ones(1)})


def test_hooks_run_in_the_stated_order_and_clip_each_example(
    seeded_module: Make, global_model: Make, data: Make
) -> None:
    hooks = Recording()
    module, batch = seeded_module(norm=False), data(4)
    recipe = Recipe(update="delta", batch_size=2, local_steps=2, precision="float64", learning_rate=0.1)
    update, state = client_step(global_model(module), batch, recipe, hooks=hooks, state=ClientState(rounds=4))
    step = ["batch 2", "per_example", "gradient 2"]
    assert hooks.calls == ["steps 4", *step, *step, "update of torch.float64"]
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

    def batch(self, batch: Batch, model: GlobalModel, generator: torch.Generator) -> Batch:
        return Batch(batch.images[:0], batch.targets[:0])


class EmptyingPerExample(Emptying):
    """The same with per-example gradients."""

    clips_per_example = True

    def per_example(self, gradients: Any, recipe: Recipe, generator: torch.Generator) -> Any:
        return {name: gradient.sum(dim=0) for name, gradient in gradients.items()}


@pytest.mark.parametrize("hooks", [Emptying(), EmptyingPerExample()])
def test_an_empty_batch_trains_nothing(hooks: Hooks, seeded_module: Make, global_model: Make, data: Make) -> None:
    update, _ = client_step(global_model(seeded_module()), data(2), Recipe(update="delta", batch_size=2), hooks=hooks)
    assert all(not tensor.any() for tensor in update.trainable.values())
    assert update.examples == 2


class Choosing(Hooks):
    """The second step takes nothing, the others two images of its choice."""

    def steps(self, images: int, recipe: Recipe, generator: torch.Generator) -> list[Tensor]:
        return [torch.tensor([3, 0]), torch.tensor([], dtype=torch.int64), torch.tensor([1, 3])][: recipe.epochs + 1]


@pytest.mark.parametrize("update", ["gradient", "delta"])
def test_a_defense_may_choose_the_images_of_every_step(
    update: Any, seeded_module: Make, global_model: Make, data: Make
) -> None:
    module, batch = seeded_module(norm=False), data(4)
    recipe = Recipe(batch_size=4, precision="float64", learning_rate=0.1)
    if update == "delta":
        recipe = replace(recipe, update=update, batch_size=2, local_steps=2, epochs=2)
    sent, _ = client_step(global_model(module), batch, recipe, hooks=Choosing())
    assert sent.examples == 4
    plain = copy.deepcopy(module)
    steps = [[3, 0]] if update == "gradient" else [[3, 0], [1, 3]]
    for step in steps:
        loss = nn.functional.cross_entropy(plain(batch.images[step]), batch.targets[step])
        gradients = torch.autograd.grad(loss, list(plain.parameters()))
        if update == "gradient":
            for tensor, gradient in zip(sent.trainable.values(), gradients, strict=True):
                torch.testing.assert_close(tensor, gradient, rtol=1e-9, atol=1e-12)
            return
        with torch.no_grad():
            for parameter, gradient in zip(plain.parameters(), gradients, strict=True):
                parameter.sub_(0.1 * gradient)
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(
            sent.trainable[name], (parameter - module.get_parameter(name)).detach(), rtol=1e-9, atol=1e-12
        )


class Refusing(Hooks):
    """Cannot be applied to Adam."""

    def refusals(self, model: GlobalModel, recipe: Recipe) -> list[str]:
        return [f"{model.name}: use optimizer: sgd"] if recipe.optimizer == "adam" else []


def test_a_client_does_not_start_what_its_defense_refuses(seeded_module: Make, global_model: Make, data: Make) -> None:
    model = global_model(seeded_module())
    client_step(model, data(1), Recipe(), hooks=Refusing())
    with pytest.raises(SpecError, match="use optimizer: sgd"):
        client_step(model, data(1), Recipe(optimizer="adam"), hooks=Refusing())


class Measuring(Hooks):
    """Clips nothing and writes down the norms of per-example gradients that it sees."""

    clips_per_example = True

    def __init__(self) -> None:
        self.norms: list[float] = []

    def per_example(self, gradients: Any, recipe: Recipe, generator: torch.Generator) -> Any:
        self.norms.append(float(torch.cat([g.flatten(1) for g in gradients.values()], dim=1).norm(dim=1)[0]))
        return super().per_example(gradients, recipe, generator)


def test_defenses_see_gradients_without_the_loss_scale(seeded_module: Make, global_model: Make, data: Make) -> None:
    model, batch = global_model(seeded_module(norm=False)), data(1)
    for update in ("gradient", "delta"):
        single, half = Measuring(), Measuring()
        client_step(model, batch, Recipe(update=update), hooks=single)
        client_step(model, batch, Recipe(update=update, precision="float16"), hooks=half)
        assert half.norms[-1] == pytest.approx(single.norms[-1], rel=0.05)


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
def test_impossible_recipes_are_refused_with_the_field(
    settings: dict[str, Any], words: str, seeded_module: Make, global_model: Make, data: Make
) -> None:
    with pytest.raises(SpecError, match=words):
        client_step(global_model(seeded_module()), data(2), Recipe(**settings))


@pytest.mark.parametrize("held", [2, 5])
def test_a_client_must_hold_as_many_images_as_its_local_steps_take(
    held: int, seeded_module: Make, global_model: Make, data: Make
) -> None:
    with pytest.raises(SpecError, match=f"3 to 4 images, but the client holds {held}"):
        client_step(global_model(seeded_module()), data(held), Recipe(update="delta", batch_size=2, local_steps=2))


def test_per_example_gradients_with_batch_statistics_are_refused(
    seeded_module: Make, global_model: Make, data: Make
) -> None:
    with pytest.raises(SpecError, match="batch_norm: eval"):
        client_step(global_model(seeded_module()), data(2), Recipe(batch_size=2, batch_norm="train"), hooks=Recording())


def test_images_of_another_shape_are_refused(seeded_module: Make, global_model: Make) -> None:
    with pytest.raises(ModelError, match=r"\(2, 6, 6\).*\(2, 5, 6\)"):
        client_step(global_model(seeded_module()), Batch(torch.rand(1, 2, 5, 6), torch.tensor([0])), Recipe())
