"""Everything that runs on a GPU makes its tensors there, gives the CPU's results, and seldom makes the host wait."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pretended_device import DEVICE, pretended_device
from torch import Tensor, nn

from medpfl.attacks import ATTACKS
from medpfl.attacks.crafted import CraftedAttack
from medpfl.attacks.matching.adam import Adam
from medpfl.attacks.matching.gradients import Layout, matching_objective
from medpfl.attacks.matching.lbfgs import LBFGS
from medpfl.attacks.matching.objectives import DISTANCES
from medpfl.attacks.matching.priors import smooth
from medpfl.attacks.matching.problem import build_problem
from medpfl.attacks.matching.states import Solver
from medpfl.core.devices import CPU, choose_device, moved
from medpfl.core.domain import Batch, GlobalModel, Observation, Recipe, Reconstruction, Update
from medpfl.core.errors import MissingExtra, SpecError
from medpfl.core.tasks import SingleLabel
from medpfl.defenses import DEFENSES
from medpfl.federation.client import client_step
from medpfl.federation.recipes import check_recipe
from medpfl.federation.training import TrainingConfig, train
from medpfl.models import MODELS, Normalization, build_model, prepare

SIZES = {
    "resnet18_cifar": 8,
    "lenet_cpl": 12,
    "lenet_dlg": 12,
    "lenet_idlg": 12,
    "densenet121": 32,
    "efficientnet_b0": 32,
}
OTHERS = ("vit_b16", "unet", "unet_small")
"""`vit` with other numbers, and models for masks."""

RECIPES = {
    "gradient": Recipe(batch_size=2),
    "clipped": Recipe(batch_size=2, gradient_clip=0.01, accumulation=2),
    "adam": Recipe(update="delta", local_steps=2, epochs=2, optimizer="adam", weight_decay=0.1),
    "momentum": Recipe(update="weights", local_steps=2, momentum=0.9, batch_norm="train", batch_size=2),
}


def zoo_model(name: str, normalize: Normalization | None = None) -> GlobalModel:
    size = SIZES.get(name, 16)
    generator = torch.Generator().manual_seed(0)
    try:
        return build_model(
            name, image_shape=(3, size, size), task=SingleLabel(4), generator=generator, normalize=normalize
        )
    except MissingExtra as error:
        pytest.skip(str(error))


def batch_of(model: GlobalModel, recipe: Recipe) -> Batch:
    generator = torch.Generator().manual_seed(1)
    count = recipe.private_images
    return Batch(torch.rand(count, *model.image_shape, generator=generator), torch.arange(count) % 4)


def observation_of(model: GlobalModel, recipe: Recipe) -> Observation:
    update, _ = client_step(model, batch_of(model, recipe), recipe)
    return Observation(model, update, recipe, "eavesdropper")


def close(found: Tensor, expected: Tensor) -> bool:
    return bool(torch.allclose(found.cpu().double(), expected.double(), rtol=1e-5, atol=1e-8))


@pytest.mark.parametrize("name", sorted(set(MODELS.names()) - set(OTHERS)))
def test_the_matching_objective_of_every_model(name: str) -> None:
    observation = observation_of(zoo_model(name), Recipe(precision="float64"))
    start = torch.rand(2, 3 * SIZES.get(name, 16) ** 2, dtype=torch.float64)

    def evaluated(seen: Observation, variables: Tensor) -> tuple[Tensor, Tensor]:
        problem = build_problem([seen], "float64")
        objective = matching_objective(
            problem,
            Layout((1, *seen.model.image_shape)),
            torch.zeros(1, 1, dtype=torch.int64, device=problem.device),
            distance=DISTANCES["cosine"],
            weights=problem.targets[0].new_ones(1, len(problem.names)),
            prior=smooth(0.1),
        )
        victims = torch.zeros(2, dtype=torch.int64, device=variables.device)
        objective(variables, victims)
        waits.clear()
        return objective(variables, victims)

    with pretended_device() as waits:
        expected = evaluated(observation, start)
        found = evaluated(moved(observation, DEVICE), start.to(DEVICE))
        assert not waits
        assert found[0].device == found[1].device == DEVICE
        assert close(found[0], expected[0])
        assert close(found[1], expected[1])


LAYOUT = Layout((1, 3, 5, 5))
SOLVERS: dict[str, Solver] = {
    "adam": Adam(LAYOUT, 30, 0.1, (0.5, 1.0, 2.0), median_filter_every=4, patience=20),
    "lbfgs": LBFGS(30, history=4),
}


@pytest.mark.parametrize("name", sorted(SOLVERS))
def test_the_host_waits_once_in_a_block_of_evaluations(name: str) -> None:
    solver = SOLVERS[name]

    def bowl(variables: Tensor, victims: Tensor) -> tuple[Tensor, Tensor]:
        return (variables**4).sum(dim=1), 4.0 * variables**3

    start = torch.rand(3, LAYOUT.size, dtype=torch.float64)
    victims = torch.arange(3)
    with pretended_device() as waits:
        states = [
            solver.start(bowl, variables, whose, variables.new_zeros(3))
            for variables, whose in ((start, victims), (start.to(DEVICE), victims.to(DEVICE)))
        ]
        waits.clear()
        states = [solver.advance(bowl, state) for state in states]
        assert len(waits) <= 1
        assert all(tensor.device == DEVICE for tensor in states[1].values())
        for entry, tensor in states[0].items():
            assert close(states[1][entry], tensor), entry


MATCHING: dict[str, dict[str, Any]] = {
    "cpl": {"iterations": 2, "inner_iterations": 8, "restarts": 2, "tolerance": 0.0},
    "dlg": {"iterations": 1, "inner_iterations": 6, "restarts": 2, "output_error": "candidate"},
    "feature_readout": {"iterations": 20},
    "fedavg_inversion": {"iterations": 5},
    "gradinversion": {"iterations": 12, "restarts": 2, "noise": 0.01, "consensus_every": 5},
    "maximum_a_posteriori": {"iterations": 12, "prior": "none"},
    "mixture_decoding": {"iterations": 12, "decoding_steps": 20},
    "ats_decoding": {"iterations": 16, "undoing_steps": 5},
    "gradinv": {"iterations": 8, "restarts": 2, "layers": "top10", "median_filter_every": 5},
    "idlg": {"iterations": 2, "inner_iterations": 8},
}
CLOSED: dict[str, tuple[str, ...]] = {
    "april": ("vit",),
    "first_layer_readout": (),
    "peeling": (),
    "spear": (),
    "sratta": (),
}


def test_every_attack_is_here() -> None:
    honest = {name for name in ATTACKS.names() if not issubclass(ATTACKS[name].item, CraftedAttack)}
    assert honest == set(MATCHING) | set(CLOSED)


@pytest.mark.parametrize("recipe", ["gradient", "adam"])
@pytest.mark.parametrize("attack", sorted(MATCHING))
def test_attacks_give_the_results_of_the_cpu(attack: str, recipe: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(
        "medpfl.attacks.matching.inversion.gauss_newton", lambda *_: None
    )  # forward derivatives crash here
    layers = (nn.Conv2d(3, 4, 5, stride=2), nn.BatchNorm2d(4), nn.Sigmoid(), nn.Flatten(), nn.Linear(64, 4))
    units = Normalization(mean=(0.5, 0.4, 0.3), std=(0.2, 0.2, 0.3))
    model = prepare(nn.Sequential(*layers), name="small", image_shape=(3, 12, 12), task=SingleLabel(4), normalize=units)
    chosen = RECIPES[recipe] if recipe == "adam" else Recipe()
    seen = observation_of(model, chosen)
    configured = ATTACKS[attack].item(**MATCHING[attack])
    if recipe == "adam" and attack not in ("fedavg_inversion", "gradinv"):
        pytest.skip("simulates clients as the others do")
    if configured.why_not(model, chosen, chosen.update, chosen.private_images) is not None:
        pytest.skip("refused")
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    with pretended_device():
        (expected,) = configured.reconstruct([seen], generators[:1])
        (found,) = configured.reconstruct([moved(seen, DEVICE)], generators[1:])
    assert isinstance(expected, Reconstruction)
    assert isinstance(found, Reconstruction), found
    assert found.images.device == CPU
    assert found.gradient_evaluations == expected.gradient_evaluations
    assert float((found.images - expected.images).abs().max()) < 1e-3
    assert found.labels is None or found.labels.device == CPU


@pytest.mark.parametrize("attack", ["first_layer_readout", "peeling", "spear"])
def test_closed_forms_read_an_observation_from_the_device(attack: str) -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(48, 60), nn.ReLU(), nn.Linear(60, 4))
    model = prepare(module, name="dense", image_shape=(3, 4, 4), task=SingleLabel(4))
    seen = observation_of(model, Recipe())
    with pretended_device():
        (found,) = ATTACKS[attack].item().reconstruct([moved(seen, DEVICE)], [torch.Generator().manual_seed(0)])
    assert isinstance(found, Reconstruction), found
    assert float((found.images - batch_of(model, Recipe()).images).abs().max()) < 1e-4


def test_sratta_reads_several_steps_from_the_device_as_from_the_cpu() -> None:
    module = nn.Sequential(nn.Flatten(), nn.Linear(48, 60), nn.ReLU(), nn.Linear(60, 4))
    model = prepare(module, name="dense", image_shape=(3, 4, 4), task=SingleLabel(4))
    seen = observation_of(model, Recipe(update="weights", batch_size=2, local_steps=2, learning_rate=0.1))
    with pretended_device():
        (expected,) = ATTACKS["sratta"].item().reconstruct([seen], [torch.Generator()])
        (found,) = ATTACKS["sratta"].item().reconstruct([moved(seen, DEVICE)], [torch.Generator()])
    assert isinstance(expected, Reconstruction), expected
    assert isinstance(found, Reconstruction), found
    assert len(found.images) == len(expected.images) > 0
    assert float((found.images.cpu() - expected.images).abs().max()) < 1e-4


@pytest.mark.parametrize("defense", DEFENSES.names())
@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_client_steps_with_every_defense(defense: str, recipe: str) -> None:
    model = zoo_model("resnet18_cifar")
    hooks = DEFENSES[defense].item()
    batch = batch_of(model, RECIPES[recipe])
    if refused := check_recipe(RECIPES[recipe], model, hooks):
        assert all(refused)  # said before any compute, whatever the device
        return
    updates: list[Update] = []
    with pretended_device():
        for device in (CPU, DEVICE):
            generator = torch.Generator().manual_seed(3)
            placed = moved((model, batch), device)
            updates.append(client_step(*placed, RECIPES[recipe], hooks=hooks, generator=generator)[0])
        for name, tensor in updates[0].trainable.items():
            assert updates[1].trainable[name].device == DEVICE
            assert close(updates[1].trainable[name], tensor)
        assert all(tensor.device == DEVICE for tensor in updates[1].buffers.values())


def test_training() -> None:
    model = zoo_model("lenet_dlg")
    images, targets = torch.rand(8, 3, 12, 12), torch.arange(8) % 4
    config = TrainingConfig(epochs=2, batch_size=4)
    with pretended_device():
        found, _ = train(moved(model, DEVICE), images, targets, config, torch.Generator().manual_seed(0))
        expected, _ = train(model, images, targets, config, torch.Generator().manual_seed(0))
        assert found.device == DEVICE
        assert all(close(found.parameters[name], tensor) for name, tensor in expected.parameters.items())


def test_moving_keeps_what_is_shared_and_what_needs_no_move() -> None:
    model = zoo_model("lenet_dlg")
    pair = [observation_of(model, Recipe()) for _ in range(2)]
    assert moved(pair, CPU) is pair
    with pretended_device():
        first, second = moved(pair, DEVICE)
        assert first.model is second.model
        assert first.model.device == DEVICE
        assert first.recipe is pair[0].recipe


def test_devices_that_cannot_be_had_are_refused_with_a_way_out() -> None:
    assert choose_device("cpu") == "cpu"
    with pytest.raises(SpecError, match="device: expected auto, cpu, cuda or a GPU such as cuda:0, found 'gpu'"):
        choose_device("gpu")
    if not torch.cuda.is_available():
        assert choose_device("auto") == "cpu"
        with pytest.raises(SpecError, match=r"'cuda:1' was asked for, but PyTorch finds no GPU here.*use auto or cpu"):
            choose_device("cuda:1")
