"""MedLeak's relatives prepare, and read, on a GPU what they do on the CPU."""

from __future__ import annotations

import pytest
import torch
from pretended_device import DEVICE, pretended_device

from medpfl.attacks.crafted import CraftedAttack, ServerView
from medpfl.attacks.curious_abandon_honesty import CuriousAbandonHonesty
from medpfl.attacks.fishing import Fishing
from medpfl.attacks.robbing_the_fed import RobbingTheFed
from medpfl.core.devices import CPU, moved
from medpfl.core.domain import Auxiliary, Batch, Knowledge, Observation, Recipe, Reconstruction
from medpfl.core.tasks import SingleLabel
from medpfl.federation import Plain, run_round
from medpfl.models import build_model

ATTACKS = {
    "imprint": RobbingTheFed(bins=32),
    "sparse": RobbingTheFed(bins=32, variant="sparse", query="random", connection="residual"),
    "traps": CuriousAbandonHonesty(units=40),
    "traps by factor": CuriousAbandonHonesty(units=40, tuning="factor", scale=1e-3, read="peeling"),
    "fishing by class": Fishing(iterations=2),
    "fishing by feature": Fishing(by="feature", label=1, iterations=2),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_round_on_a_gpu_is_the_same_round(name: str) -> None:
    def played(device: torch.device) -> Reconstruction:
        attack, generator = ATTACKS[name], torch.Generator().manual_seed(0)
        assert isinstance(attack, CraftedAttack)
        model = build_model("lenet_idlg", image_shape=(1, 12, 12), task=SingleLabel(3), generator=generator)
        images = torch.rand(48, 1, 12, 12, generator=generator) * torch.rand(48, 1, 1, 1, generator=generator)
        targets = torch.arange(48) % 3
        recipe = Recipe(update="weights", batch_size=4, learning_rate=0.1)
        held = Batch(images[:4], torch.tensor([0, 1, 2, 2]) if name == "fishing by class" else torch.ones(4).long())
        model, held = moved(model, device), moved(held, device)
        knowledge = moved(Knowledge(auxiliary=Auxiliary(images[4:], targets[4:])), device)
        view = ServerView(model, recipe, "weights", Plain(), 4, "malicious_server", attack.needs(), knowledge)
        sent = attack.prepare(view, generator)
        update = run_round(sent, [(held, generator)], recipe, generator=generator)
        seen = Observation(sent.model(0), update, recipe, "malicious_server", broadcast=sent)
        (result,) = attack.reconstruct([seen], [generator])
        assert isinstance(result, Reconstruction), result
        return result

    with pretended_device():
        expected, found = played(CPU), played(DEVICE)
    assert len(found.images) == len(expected.images)
    assert found.stop_reason == expected.stop_reason
    torch.testing.assert_close(found.images.cpu(), expected.images, atol=1e-3, rtol=0)
