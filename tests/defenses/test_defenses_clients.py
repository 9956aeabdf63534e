"""Bounds and noise on a client's whole update: clip, delta_bound, fed_sdp, model_cloaking, local_dp."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from pydantic import ValidationError
from torch import Tensor

from medpfl.core.domain import Batch, Broadcast, ClientState, GlobalModel, Update
from medpfl.core.errors import SpecError
from medpfl.core.guarantees import Release
from medpfl.core.mechanisms import Clipped, ThreeValues
from medpfl.core.recipes import Recipe
from medpfl.core.tasks import SingleLabel
from medpfl.defenses import Clip, Composition, Defense, DeltaBound, FedSDP, LocalDP, ModelCloaking
from medpfl.federation import SecAggPlus, client_step, run_round
from medpfl.models import build_model


@pytest.fixture(scope="module")
def model() -> GlobalModel:
    return build_model(
        "lenet_idlg", image_shape=(1, 16, 16), task=SingleLabel(3), generator=torch.Generator().manual_seed(0)
    )


def batch_of(count: int) -> Batch:
    images = torch.rand((count, 1, 16, 16), generator=torch.Generator().manual_seed(count))
    return Batch(images, torch.arange(count) % 3)


def change(update: Update, model: GlobalModel) -> np.ndarray[Any, Any]:
    """What was sent as one vector, less the received weights where weights were sent."""
    before = model.parameters if update.kind == "weights" else {}
    parts = [(tensor.double() - before.get(name, torch.zeros(1)).double()) for name, tensor in update.trainable.items()]
    return np.concatenate([part.flatten().numpy() for part in parts])


ORDERS: dict[Any, float] = {"l2": 2, "l1": 1}


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("kind", ["gradient", "delta", "weights"])
@pytest.mark.parametrize("defense", [Clip, DeltaBound])
def test_a_clipped_update_is_as_long_as_the_bound_and_points_where_it_did(
    defense: type[Clip], kind: Any, norm: Any, model: GlobalModel
) -> None:
    recipe = Recipe(update=kind, learning_rate=0.5)
    free = change(client_step(model, batch_of(1), recipe)[0], model)
    length = float(np.linalg.norm(free, ORDERS[norm]))
    short = change(client_step(model, batch_of(1), recipe, hooks=defense(bound=length / 4, norm=norm))[0], model)
    assert np.linalg.norm(short, ORDERS[norm]) == pytest.approx(length / 4, rel=1e-4)
    np.testing.assert_allclose(short, free / 4, rtol=1e-2, atol=2e-7)
    loose = change(client_step(model, batch_of(1), recipe, hooks=defense(bound=length * 4, norm=norm))[0], model)
    np.testing.assert_allclose(loose, free, rtol=1e-5, atol=1e-7)


def test_an_update_with_one_number_that_is_not_finite_stays_unusable(model: GlobalModel) -> None:
    for broken in (math.nan, math.inf):
        tensors = {name: tensor.clone() for name, tensor in model.parameters.items()}
        next(iter(tensors.values())).view(-1)[0] = broken
        update = Update("delta", tensors, {}, {}, 1)
        defenses: list[Defense] = [Clip(), FedSDP(), ModelCloaking(), LocalDP()]
        for defense in defenses:
            sent, _ = defense.update(update, model, ClientState(), torch.Generator().manual_seed(0))
            assert not all(bool(torch.isfinite(tensor).all()) for tensor in sent.trainable.values())


def test_a_bound_for_one_image_is_refused_for_the_mean_of_several(model: GlobalModel) -> None:
    claims_image = Clip(unit="image")
    client_step(model, batch_of(1), Recipe(), hooks=claims_image)
    with pytest.raises(SpecError, match="bounds nothing of a single image; use unit: client, or dp_sgd"):
        client_step(model, batch_of(2), Recipe(batch_size=2), hooks=claims_image)
    assert not Clip().refusals(model, Recipe(batch_size=2))


@pytest.mark.parametrize("pinned", [True, False])
def test_a_server_that_raises_the_learning_rate_escapes_a_bound_unless_the_recipe_is_pinned(
    pinned: bool, model: GlobalModel
) -> None:
    """A crafted layer that changes little at the agreed learning rate changes by the whole bound at one of 1000."""
    agreed = Recipe(update="delta", learning_rate=0.001)
    told = Recipe(update="delta", learning_rate=1.0)
    defense: Defense = DeltaBound(bound=1.0) if pinned else Clip(bound=1.0)
    honest = change(client_step(model, batch_of(1), agreed)[0], model)
    sent = run_round(
        Broadcast((model,), recipe=told, aggregation={"clipping_range": 1e-3}),
        [(batch_of(1), torch.Generator()), (batch_of(1), torch.Generator())],
        agreed,
        hooks=defense,
        channel=SecAggPlus(clients=2),
        generator=torch.Generator().manual_seed(0),
    )
    length = float(np.linalg.norm(change(sent, model)))
    assert (length < 2 * float(np.linalg.norm(honest)) + 0.02) == pinned


@pytest.mark.parametrize(
    ("defense", "std"),
    [
        (FedSDP(bound=0.5, noise_multiplier=2.0), 1.0),
        (FedSDP(bound=0.5, noise_multiplier=0.0), 0.0),
        (FedSDP(bound=0.5, noise_multiplier=2.0, added_by="server"), 0.0),
        (ModelCloaking(bound=0.5, noise_multiplier=2.0), 1.0),
    ],
)
@pytest.mark.parametrize("kind", ["gradient", "delta", "weights"])
def test_client_level_noise_has_the_deviation_of_multiplier_times_bound(
    defense: Defense, std: float, kind: Any, model: GlobalModel
) -> None:
    recipe = Recipe(update=kind, batch_size=2, learning_rate=0.5, precision="float64")
    sent, _ = client_step(model, batch_of(2), recipe, hooks=defense, generator=torch.Generator().manual_seed(3))
    quiet, _ = client_step(model, batch_of(2), recipe, hooks=Clip(bound=0.5))
    noise = change(sent, model) - change(quiet, model)
    if std == 0:
        np.testing.assert_allclose(noise, 0, atol=1e-12)
    else:
        assert scipy.stats.kstest(noise, scipy.stats.norm(0, std).cdf).pvalue > 1e-3


def test_who_adds_the_noise_is_said(model: GlobalModel) -> None:
    at_server, at_client = FedSDP(added_by="server"), FedSDP()
    assert at_server.mechanism() == Clipped(4.0)
    assert "server adds the noise" in at_server.warnings()[0]
    assert not at_client.warnings()
    for defense, who in ((at_server, "server"), (at_client, "client")):
        guarantee = defense.guarantee(Recipe(), 1)
        assert guarantee is not None
        assert (guarantee.unit, guarantee.added_by) == ("client", who)
        assert guarantee.releases == (Release("gaussian", 1.0),)
    assert FedSDP(noise_multiplier=0.0).guarantee(Recipe(), 1) is None


@pytest.mark.parametrize("composed", [True, False])
def test_the_server_adds_to_the_mean_what_clients_would_have_added_to_their_own(
    composed: bool, model: GlobalModel
) -> None:
    mean = Update(
        "delta", {name: torch.zeros_like(t, dtype=torch.float64) for name, t in model.parameters.items()}, {}, {}, 8
    )
    for who, std in (("server", 0.5), ("client", 0.0)):
        defense: Defense = FedSDP(bound=0.5, noise_multiplier=2.0, added_by=who)  # type: ignore[arg-type]
        defense = Composition((defense, Clip())) if composed else defense
        released = change(defense.aggregated(mean, 4, torch.Generator().manual_seed(0)), model)
        if std == 0:
            assert not released.any()
        else:
            assert scipy.stats.kstest(released, scipy.stats.norm(0, std).cdf).pvalue > 1e-3


def test_cloaking_noise_falls_to_its_floor_whatever_the_data(model: GlobalModel) -> None:
    defense = ModelCloaking(bound=1.0, noise_multiplier=2.0, decay=0.5, floor=0.3)
    found = []
    for number in (0, 1, 5):
        both = []
        for count in (1, 3):
            sent, state = client_step(
                model,
                batch_of(count),
                Recipe(batch_size=count, precision="float64"),
                hooks=defense,
                state=ClientState(rounds=number),
                generator=torch.Generator().manual_seed(number),
            )
            assert state.rounds == number + 1
            quiet, _ = client_step(
                model, batch_of(count), Recipe(batch_size=count, precision="float64"), hooks=Clip(bound=1.0)
            )
            both.append(float(np.std(change(sent, model) - change(quiet, model))))
        assert both[0] == pytest.approx(both[1], rel=1e-9)
        found.append(both[0])
    assert found == pytest.approx([2.0, 1.0, 0.3], rel=0.05)
    guarantee = defense.guarantee(Recipe(), 1)
    assert guarantee is not None
    assert [guarantee.releases[0].in_round(number) for number in (0, 1, 5)] == [2.0, 1.0, 0.3]


def sent_values(defense: LocalDP, value: float, count: int, seed: int = 0) -> Tensor:
    """What becomes of `count` entries of one value."""
    model = GlobalModel("m", torch.nn.Identity(), {"w": torch.zeros(count)}, {}, {}, SingleLabel(2), (1, 2, 2))
    update = Update("delta", {"w": torch.full((count,), value, dtype=torch.float64)}, {}, {}, 1)
    return defense.update(update, model, ClientState(), torch.Generator().manual_seed(seed))[0].trainable["w"]


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_local_dp_is_unbiased_inside_its_interval_and_cuts_off_outside(epsilon: float) -> None:
    count, defense = 200_000, LocalDP(epsilon=epsilon, length=0.2)
    magnitude = 0.2 * (math.exp(epsilon) + 2) / (2 * (math.exp(epsilon) - 1))
    for value, mean in ((0.1, 0.1), (0.03, 0.03), (-0.07, -0.07), (5.0, 0.1)):
        sent = sent_values(defense, value, count)
        np.testing.assert_allclose(np.unique(sent.numpy()), np.array([-magnitude, 0.0, magnitude]), rtol=1e-9)
        error = magnitude / math.sqrt(count)
        assert float(sent.mean()) == pytest.approx(mean, abs=4 * error)


def test_the_odds_of_local_dp_are_exactly_epsilon_between_the_ends() -> None:
    epsilon, count = 1.0, 400_000
    defense = LocalDP(epsilon=epsilon, length=2.0)
    shares = []
    for value in (1.0, -1.0):
        sent = sent_values(defense, value, count)
        shares.append([float((sent.sign() == sign).double().mean()) for sign in (1, 0, -1)])
    plus, zero, minus = shares[0]
    assert plus / shares[1][0] == pytest.approx(math.e, rel=0.02)
    assert shares[1][2] / minus == pytest.approx(math.e, rel=0.02)
    assert zero == pytest.approx(shares[1][1], rel=0.02)
    assert zero == pytest.approx(1 / (math.e + 2), rel=0.02)


def test_local_dp_of_weights_is_centered_on_the_received_ones(model: GlobalModel) -> None:
    recipe, defense = Recipe(update="weights", precision="float64"), LocalDP(epsilon=3.0, length=0.01)
    sent, _ = client_step(model, batch_of(1), recipe, hooks=defense, generator=torch.Generator().manual_seed(0))
    magnitude = ThreeValues(3.0, 0.01).magnitude
    np.testing.assert_allclose(np.unique(np.abs(change(sent, model)).round(9)), [0.0, round(magnitude, 9)], atol=1e-9)


def test_local_dp_says_that_its_epsilon_is_that_of_one_entry() -> None:
    guarantee = LocalDP(epsilon=2.0).guarantee(Recipe(), 1)
    assert guarantee is not None
    assert (guarantee.unit, guarantee.releases) == ("weight", (Release("randomized_response", 2.0),))
    assert "m * T * epsilon" in guarantee.remarks[0]


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda: Clip(bound=0.0), "bound"),
        (lambda: DeltaBound(bound=math.inf), "bound"),
        (lambda: FedSDP(noise_multiplier=-1.0), "noise_multiplier"),
        (lambda: ModelCloaking(decay=1.5), "decay"),
        (lambda: ModelCloaking(noise_multiplier=0.5, floor=0.6), "floor"),
        (lambda: LocalDP(epsilon=0.0), "epsilon"),
        (lambda: LocalDP(length=-1.0), "length"),
    ],
)
def test_impossible_settings_are_refused_with_the_field(make: Any, field: str) -> None:
    with pytest.raises(ValidationError, match=field):
        make()
