"""What leaves the client when it sends fewer tensors, and what CENSOR's directions have of the gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from medpfl.core.domain import Batch, GlobalModel, Recipe, Update
from medpfl.core.tasks import SingleLabel
from medpfl.defenses import Censor, Lora, Share
from medpfl.defenses.censor import orthogonal
from medpfl.federation.client import client_step
from medpfl.federation.hooks import NO_HOOKS
from medpfl.federation.traffic import bytes_sent
from medpfl.models import prepare


def net() -> GlobalModel:
    """Convolutions with batch norm, a grouped convolution, two dense layers."""
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(1, 6, 3, stride=2, padding=1),
        nn.BatchNorm2d(6),
        nn.Sigmoid(),
        nn.Conv2d(6, 6, 3, groups=2),
        nn.Flatten(),
        nn.Linear(6 * 16, 10),
        nn.Sigmoid(),
        nn.Linear(10, 3),
    )
    return prepare(module, name="mixed", image_shape=(1, 12, 12), task=SingleLabel(3))


def batch(count: int = 1) -> Batch:
    """Random images."""
    generator = torch.Generator().manual_seed(7)
    return Batch(torch.rand((count, 1, 12, 12), generator=generator), torch.arange(count) % 3)


TRAINING = Recipe(update="weights", batch_size=2, local_steps=2, batch_norm="train", learning_rate=0.1)


def sent(defense: Any, recipe: Recipe, images: int) -> tuple[GlobalModel, Update]:
    """The model of the federation and what a client of it sends."""
    model = defense.model(net())
    update, _ = client_step(model, batch(images), recipe, hooks=defense, generator=torch.Generator().manual_seed(1))
    return model, update


class TestShare:
    """An allow list of names, and no byte of a buffer."""

    def test_buffers_and_counters_stay_at_the_client(self) -> None:
        _, everything = sent(Share(buffers=True), TRAINING, 4)
        _, update = sent(Share(), TRAINING, 4)
        assert everything.buffers
        assert everything.counters
        assert not update.buffers
        assert not update.counters
        assert all(torch.equal(update.trainable[name], tensor) for name, tensor in everything.trainable.items())
        missing = 4 * sum(tensor.numel() for tensor in everything.buffers.values()) + 8 * len(everything.counters)
        assert bytes_sent(everything, NO_HOOKS.mechanism()) - bytes_sent(update, Share().mechanism()) == missing

    def test_only_named_tensors_are_sent_and_all_are_trained(self) -> None:
        _, everything = sent(Share(), TRAINING, 4)
        _, update = sent(Share(tensors=("7.*",)), TRAINING, 4)
        assert list(update.trainable) == ["7.weight", "7.bias"]
        for name, tensor in update.trainable.items():
            assert torch.equal(tensor, everything.trainable[name])

    def test_frozen_tensors_are_neither_trained_nor_sent(self) -> None:
        model, update = sent(Share(frozen=("0.*", "1.*")), TRAINING, 4)
        assert not [name for name in update.trainable if name[0] in "01"]
        expected, _ = client_step(net(), batch(4), TRAINING)
        images = batch(2).images
        assert torch.equal(model.forward(images)[0], net().forward(images)[0])
        assert not torch.equal(update.trainable["7.bias"], expected.trainable["7.bias"])

    def test_patterns_that_mean_nothing_are_refused(self) -> None:
        model, recipe = net(), Recipe()
        assert not Share(tensors=("7.*",), frozen=("0.*",)).refusals(model, recipe)
        assert "'head.*'" in Share(tensors=("head.*",)).refusals(model, recipe)[0]
        assert "nothing is left to train" in Share(frozen=("*",)).refusals(model, recipe)[0]
        assert "all that would be sent is frozen" in Share(tensors=("7.*",), frozen=("7.*",)).refusals(model, recipe)[0]
        frozen = Share(frozen=("0.*",))
        assert not frozen.refusals(frozen.model(model), recipe)


class TestLora:
    """Adapters beside frozen layers."""

    def test_the_adapted_model_computes_what_the_model_did(self) -> None:
        images = batch(3).images
        torch.testing.assert_close(Lora().model(net()).forward(images)[0], net().forward(images)[0])

    def test_factors_add_their_product(self) -> None:
        model = Lora(rank=2, alpha=6, head="factors", b_spread=0.3).model(net())
        images = batch(2).images
        tensors = {**model.parameters, **model.constants}

        def weight(path: str) -> torch.Tensor:
            a, b = tensors[f"{path}.lora_A"], tensors[f"{path}.lora_B"]
            product = (b.flatten(1) @ a.flatten(1)).reshape(tensors[f"{path}.weight"].shape)
            return tensors[f"{path}.weight"] + 3.0 * product

        hidden = functional.conv2d(images, weight("0"), tensors["0.bias"], stride=2, padding=1)
        buffers = model.buffers
        hidden = functional.batch_norm(
            hidden, buffers["1.running_mean"], buffers["1.running_var"], tensors["1.weight"], tensors["1.bias"]
        )
        hidden = functional.conv2d(hidden.sigmoid(), tensors["3.weight"], tensors["3.bias"], groups=2).flatten(1)
        hidden = functional.linear(hidden, weight("5"), tensors["5.bias"]).sigmoid()
        expected = functional.linear(hidden, weight("7"), tensors["7.bias"])
        torch.testing.assert_close(model.forward(images)[0], expected)

    def test_only_factors_and_the_head_are_trained_and_sent(self) -> None:
        model, update = sent(Lora(rank=2), TRAINING, 4)
        assert set(update.trainable) == {
            "0.lora_A", "0.lora_B", "5.lora_A", "5.lora_B", "7.weight", "7.bias",
        }  # fmt: skip
        assert set(model.constants) >= {"0.weight", "0.bias", "3.weight", "5.weight"}
        _, factors = sent(Lora(rank=2, head="factors", layers="7"), TRAINING, 4)
        assert set(factors.trainable) == {"7.lora_A", "7.lora_B"}

    def test_at_the_start_only_rank_numbers_of_each_input_show(self) -> None:
        model, update = sent(Lora(rank=2, layers="5"), Recipe(), 1)
        seen: list[torch.Tensor] = []
        handle = model.module.get_submodule("5").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        model.forward(batch().images)
        handle.remove()
        assert not update.trainable["5.lora_A"].any()
        gradient = update.trainable["5.lora_B"].numpy()
        shown = (model.parameters["5.lora_A"] @ seen[0][0]).numpy()
        _, values, right = np.linalg.svd(gradient)
        assert values[1] < 1e-6 * values[0]
        assert abs(right[0] @ shown) == pytest.approx(np.linalg.norm(shown), rel=1e-5)

    def test_later_a_row_of_a_factor_is_the_input_up_to_scale(self) -> None:
        model, update = sent(Lora(rank=2, layers="5", b_spread=0.5), Recipe(), 1)
        seen: list[torch.Tensor] = []
        handle = model.module.get_submodule("5").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        model.forward(batch().images)
        handle.remove()
        row, given = update.trainable["5.lora_A"][0].numpy(), seen[0][0].numpy()
        assert abs(np.corrcoef(row, given)[0, 1]) > 0.999999
        assert abs(row @ given) == pytest.approx(np.linalg.norm(row) * np.linalg.norm(given), rel=1e-5)

    def test_everybody_draws_the_same_factors(self) -> None:
        first, again = Lora().model(net()), Lora().model(net())
        assert all(torch.equal(first.parameters[name], again.parameters[name]) for name in first.parameters)

    def test_models_without_such_layers_are_refused(self) -> None:
        module = nn.Sequential(nn.Conv2d(2, 4, 3, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        model = prepare(module, name="grouped", image_shape=(2, 8, 8), task=SingleLabel(4))
        assert "no dense or plain convolution layer" in Lora().refusals(model, Recipe())[0]
        assert "no layer of 'mixed'" in Lora(layers="body*", head="frozen").refusals(net(), Recipe())[0]
        assert not Lora(layers="5", head="frozen").refusals(net(), Recipe())


class TestCensor:
    """Orthogonal, of the same norm, and the best of the trials."""

    def test_directions_are_orthogonal_and_as_long_as_the_gradient(self) -> None:
        model = net()
        clean, _ = client_step(model, batch(), Recipe())
        _, update = sent(Censor(trials=3), Recipe(), 1)
        for name, tensor in clean.trainable.items():
            gradient, found = tensor.double().numpy().reshape(-1), update.trainable[name].double().numpy().reshape(-1)
            norms = np.linalg.norm(gradient) * np.linalg.norm(found)
            assert abs(gradient @ found) < 1e-6 * norms
            assert np.linalg.norm(found) == pytest.approx(np.linalg.norm(gradient), rel=1e-6)

    def test_single_entries_and_zeros_become_zero(self) -> None:
        assert not orthogonal(torch.tensor([3.0]), torch.Generator()).any()
        assert not orthogonal(torch.zeros(4), torch.Generator()).any()

    def test_takes_the_trial_with_the_lowest_loss(self) -> None:
        model, one = net(), batch()

        def loss(update: Update) -> float:
            moved = {name: tensor - 0.1 * update.trainable[name] for name, tensor in model.parameters.items()}
            return float(model.task.loss(model.forward(one.images, parameters=moved)[0], one.targets))

        def after(trials: int) -> float:
            censor = Censor(trials=trials, step_size=0.1)
            update, _ = client_step(model, one, Recipe(), hooks=censor, generator=torch.Generator().manual_seed(3))
            return loss(update)

        assert after(40) < after(1)

    def test_works_in_every_local_step(self) -> None:
        _, update = sent(Censor(trials=2), TRAINING, 4)
        assert all(bool(torch.isfinite(tensor).all()) for tensor in update.trainable.values())
