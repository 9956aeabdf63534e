"""Batch-norm statistics that an update shows, against plain `torch.nn.BatchNorm2d`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from medpfl.attacks.batch_statistics import known_statistics, values_per_channel
from medpfl.attacks.gradinversion import GradInversion
from medpfl.core.domain import Batch, Failure, GlobalModel, Knowledge, Observation, Recipe, Reconstruction
from medpfl.federation.client import client_step

TRAIN = Recipe(batch_size=4, batch_norm="train", precision="float64")


def normed_net(momentum: float | None = 0.1) -> nn.Sequential:
    """Two convolutions, each with batch norm behind it."""
    return nn.Sequential(
        nn.Conv2d(1, 5, 3, stride=2),
        nn.BatchNorm2d(5, momentum=momentum),
        nn.Sigmoid(),
        nn.Conv2d(5, 4, 3, padding=1),
        nn.BatchNorm2d(4, momentum=momentum),
        nn.Sigmoid(),
        nn.Flatten(),
        nn.Linear(4 * 9, 3),
    )


def used(net: nn.Module, seed: int = 5) -> nn.Module:
    """The net after some batches, so that its running statistics are no longer those of a new one."""
    net.train()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _ in range(3):
            net(torch.rand(6, 1, 8, 8, generator=generator))
    return net


def batch_of(count: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(1)
    return Batch(torch.rand(count, 1, 8, 8, generator=generator, dtype=torch.float64), torch.arange(count) % 3)


def observed(model: GlobalModel, recipe: Recipe, knows: Knowledge | None = None) -> Observation:
    update, _ = client_step(model, batch_of(recipe.private_images), recipe)
    return Observation(model, update, recipe, "honest_server", knows or Knowledge())


def plain_statistics(model: GlobalModel, images: Tensor) -> list[tuple[Tensor, Tensor]]:
    """What the two layers receive in train mode, computed with PyTorch's own layers, and its biased variance."""
    net = normed_net()
    net.double()
    net.load_state_dict({**model.parameters, **model.buffers, **model.counters})
    net.train()
    found = []
    with torch.no_grad():
        values = images
        for layer in net:
            if isinstance(layer, nn.BatchNorm2d):
                rows = values.transpose(0, 1).flatten(1)
                found.append((rows.mean(dim=1), rows.var(dim=1, unbiased=False)))
            values = layer(values)
    return found


@pytest.mark.parametrize("momentum", [0.1, 0.5, None])
@pytest.mark.parametrize("kind", ["gradient", "delta", "weights"])
def test_the_buffer_update_shows_the_exact_batch_statistics(kind: Any, momentum: float | None, make_model: Any) -> None:
    model = make_model(used(normed_net(momentum)), (1, 8, 8), uniform=False, double=True)
    known = known_statistics(observed(model, replace(TRAIN, update=kind)), "recovered")
    assert known.reason is None
    assert known.source == "recovered"
    assert list(known.layers) == ["1", "4"]
    for found, expected in zip(known.layers.values(), plain_statistics(model, batch_of().images), strict=True):
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def test_counts_are_those_of_values_per_channel(make_model: Any) -> None:
    model = make_model(normed_net(), (1, 8, 8))
    assert values_per_channel(model, 4) == {"1": 4 * 9, "4": 4 * 9}


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        (replace(TRAIN, batch_norm="eval"), "no buffers"),
        (replace(TRAIN, batch_norm="eval", update="delta"), "0 forward passes"),
        (replace(TRAIN, update="delta", batch_size=2, local_steps=2), "2 forward passes"),
        (replace(TRAIN, accumulation=2), "2 forward passes"),
    ],
)
def test_what_does_not_show_is_refused_with_the_reason(recipe: Recipe, reason: str, make_model: Any) -> None:
    model = make_model(used(normed_net()), (1, 8, 8), uniform=False, double=True)
    seen = observed(model, recipe)
    known = known_statistics(seen, "recovered")
    assert known.reason is not None
    assert reason in known.reason
    assert known_statistics(seen, "auto").source == "running"
    attack = GradInversion(iterations=2, restarts=1, batch_norm_statistics="recovered")
    assert attack.why_not(model, recipe, recipe.update, 4) is not None
    (failed,) = attack.reconstruct([replace(seen, recipe=None)], [torch.Generator()])
    assert isinstance(failed, Failure)


def test_buffers_that_were_changed_on_the_way_are_noticed(make_model: Any) -> None:
    model = make_model(used(normed_net()), (1, 8, 8), uniform=False, double=True)
    seen = observed(model, TRAIN)
    buffers = {name: tensor - (0.2 if "var" in name else 0.0) for name, tensor in seen.update.buffers.items()}
    changed = replace(seen, update=replace(seen.update, buffers=buffers))
    assert "changed after training" in (known_statistics(changed, "recovered").reason or "")
    assert known_statistics(changed, "auto").source == "running"


def test_the_best_knowledge_is_taken_and_named(make_model: Any) -> None:
    fresh = make_model(normed_net(), (1, 8, 8), uniform=False, double=True)
    trained = make_model(used(normed_net()), (1, 8, 8), uniform=False, double=True)
    plain = make_model(nn.Sequential(nn.Flatten(), nn.Linear(64, 3)), (1, 8, 8), double=True)
    private = plain_statistics(trained, batch_of().images)
    given = {
        f"{path}.{name}": tensor
        for path, both in zip(("1", "4"), private, strict=True)
        for name, tensor in zip(("mean", "variance"), both, strict=True)
    }
    oracle = Knowledge(batch_norm_statistics=given)
    evaluated = replace(TRAIN, batch_norm="eval")
    cases = [
        (observed(trained, TRAIN, oracle), "given", "oracle"),
        (observed(trained, TRAIN), "recovered", "recovered from the buffers"),
        (observed(trained, evaluated), "running", "the running ones"),
        (observed(fresh, evaluated), "none", "saw no data"),
        (observed(plain, TRAIN), "none", "no batch norm"),
    ]
    attack = GradInversion(iterations=1, restarts=1)
    for seen, source, note in cases:
        known = known_statistics(seen, "auto")
        assert (known.source, known.reason) == (source, None)
        (result,) = attack.reconstruct([seen], [torch.Generator().manual_seed(0)])
        assert isinstance(result, Reconstruction), result
        assert any(note in sentence for sentence in result.notes), result.notes
    for path, (mean, variance) in zip(("1", "4"), private, strict=True):
        found = known_statistics(cases[0][0], "given").layers[path]
        assert torch.equal(found[0], mean)
        assert torch.equal(found[1], variance)


def test_given_statistics_are_asked_for_as_an_oracle(make_model: Any) -> None:
    attack = GradInversion(batch_norm_statistics="given", iterations=1, restarts=1)
    assert attack.requires() == {"batch_norm_statistics"}
    assert GradInversion().requires() == frozenset()
    assert GradInversion().uses() == {"batch_norm_statistics"}
    assert GradInversion(batch_norm_statistics="running").uses() == frozenset()
    model = make_model(normed_net(), (1, 8, 8), double=True)
    (result,) = attack.reconstruct([observed(model, TRAIN)], [torch.Generator()])
    assert isinstance(result, Failure)
    assert "not granted" in result.reason
