"""The one-run audit of our own DP-SGD client: it refutes a client that does not do what it says, and no other."""

from __future__ import annotations

import pytest
import torch

from medpfl.audit.canaries import audit_client, worst_case
from medpfl.core.domain import Tensors
from medpfl.core.errors import InputError
from medpfl.core.recipes import Recipe
from medpfl.defenses import DPSGD, Laplace


class QuarterOfTheNoise(DPSGD):
    """Promises one noise multiplier and adds a quarter of it."""

    def per_example(self, gradients: Tensors, recipe: Recipe, generator: torch.Generator) -> Tensors:
        lower = DPSGD(bound=self.bound, noise_multiplier=self.noise_multiplier / 4)
        return lower.per_example(gradients, recipe, generator)


class NoClipping(DPSGD):
    """Adds the noise that it promises to gradients of any size."""

    def per_example(self, gradients: Tensors, recipe: Recipe, generator: torch.Generator) -> Tensors:
        total = {name: gradient.sum(dim=0) for name, gradient in gradients.items()}
        std = self.noise_multiplier * self.bound
        noise = {name: torch.randn(one.shape, generator=generator).to(one) for name, one in total.items()}
        return {name: (one + std * noise[name]) / recipe.batch_size for name, one in total.items()}


def test_a_right_client_is_not_refuted_and_most_of_its_epsilon_is_shown() -> None:
    model, canaries = worst_case(256)
    found = audit_client(DPSGD(noise_multiplier=0.5), model, canaries, Recipe(), runs=4)
    assert found.promised.epsilon == pytest.approx(10.0, abs=0.01)
    assert found.general.canaries == 1024
    assert not found.broken
    assert 2.0 < found.general.epsilon < found.gaussian.epsilon < found.promised.epsilon
    assert found.general.epsilon < found.general.ceiling


def test_several_steps_are_read_as_their_sum() -> None:
    model, canaries = worst_case(256)
    recipe = Recipe(update="delta", epochs=4, learning_rate=1e-3, precision="float64")
    found = audit_client(DPSGD(noise_multiplier=1.0), model, canaries, recipe, runs=4)
    assert found.promised.epsilon == pytest.approx(10.0, abs=0.01)  # four steps with 1 are one with 0.5
    assert not found.broken
    assert found.general.epsilon > 2.0


@pytest.mark.parametrize("broken", [QuarterOfTheNoise, NoClipping])
def test_a_client_that_does_not_do_what_it_says_is_refuted(broken: type[DPSGD]) -> None:
    model, canaries = worst_case(256)
    found = audit_client(broken(noise_multiplier=2.0), model, canaries, Recipe(), runs=2)
    assert found.promised.epsilon == pytest.approx(1.99, abs=0.01)
    assert found.broken


def test_a_defense_without_guarantee_is_refused() -> None:
    model, canaries = worst_case(16)
    with pytest.raises(InputError, match="guarantee per image"):
        audit_client(Laplace(), model, canaries, Recipe())
