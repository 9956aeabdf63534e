"""The leakage gate with attacks: what gradient matching gives back is not sent."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from medpfl.audit.spec import parse_spec
from medpfl.core.domain import Batch, GlobalModel, Recipe
from medpfl.core.errors import SpecError
from medpfl.data import load_dataset
from medpfl.data.readers.phantom import PhantomReader
from medpfl.federation.client import client_step, drawn_steps
from medpfl.federation.guarding import Received, Trained, Verdict
from medpfl.federation.hooks import NO_HOOKS
from medpfl.guards import LeakageGate
from medpfl.models import build_model


@pytest.fixture(scope="module")
def heads() -> Batch:
    data = load_dataset(PhantomReader(count=40, kind="brain"), name="heads", size=16, channels=1, aspect="squash")
    return Batch(data.images, data.targets)


def looked(guard: LeakageGate, images: Batch, count: int, noise: float = 0.0, kind: str = "weights") -> Verdict:
    """What the guard says to a LeNet's update on the first images, with normal noise on every entry."""
    batch = Batch(images.images[:count], images.targets[:count])
    generator = torch.Generator().manual_seed(0)
    task = load_dataset(PhantomReader(count=8, kind="brain"), name="few", size=16, channels=1, aspect="squash").task
    model: GlobalModel = build_model("lenet_dlg", image_shape=(1, 16, 16), task=task, generator=generator)
    recipe = Recipe(update=kind, learning_rate=0.1, batch_size=count)  # type: ignore[arg-type]
    steps = drawn_steps(batch, recipe, NO_HOOKS, generator)
    update, _ = client_step(model, batch, recipe, generator=generator, steps=steps)

    def noised(tensor: Tensor) -> Tensor:
        return tensor + noise * torch.randn(tensor.shape, generator=generator)

    update = replace(update, trainable={name: noised(tensor) for name, tensor in update.trainable.items()})
    verdict = guard.after(Trained(Received(model, batch, recipe), update, steps))
    assert verdict is not None
    return verdict


@pytest.mark.parametrize("kind", ["weights", "delta", "gradient"])
def test_a_lenet_passes_closed_forms_and_is_stopped_by_a_search(heads: Batch, kind: str) -> None:
    assert looked(LeakageGate(), heads, 1, kind=kind).level == "passed"
    found = looked(LeakageGate(attacks=("idlg",)), heads, 1, kind=kind)
    assert (found.level, found.withholds) == ("leaks", True)
    assert found.reasons[0].startswith("idlg gives back 1 of 1 images in ")
    assert not looked(LeakageGate(attacks=("idlg",), images=1), heads, 1, kind=kind).withholds


def test_noise_that_hides_the_image_lets_it_pass_and_the_search_is_told(heads: Batch) -> None:
    found = looked(LeakageGate(attacks=("idlg",)), heads, 1, noise=0.05)
    assert (found.level, found.withholds) == ("passed", False)
    assert any(
        "idlg gives back 0 of 1 images" in reason or "idlg not run or failed" in reason for reason in found.reasons
    )


def test_larger_updates_are_read_in_closed_form_only_and_that_is_said(heads: Batch) -> None:
    found = looked(LeakageGate(attacks=("idlg",), most_images=8), heads, 9)
    assert found.level == "passed"
    assert found.reasons == ("idlg not run: 9 images, more than 8",)


@pytest.mark.parametrize(("name", "told"), [("idgl", "found 'idgl'"), ("medleak", "medleak needs")])
def test_attacks_that_no_honest_server_runs_are_refused(name: str, told: str) -> None:
    with pytest.raises(SpecError, match=told):
        LeakageGate(attacks=(name,))


def test_a_spec_names_the_attacks_of_a_gate() -> None:
    spec = parse_spec(
        {
            "data": [{"name": "heads", "reader": "phantom", "kind": "brain", "count": 8, "size": 16, "victims": 1}],
            "models": [{"name": "lenet_dlg"}],
            "guards": [{"name": "leakage_gate", "attacks": ["idlg", "gradinv"]}],
            "attacks": [{"name": "idlg"}],
        },
        base=Path(),
    )
    assert spec.guards[0].guard == LeakageGate(attacks=("idlg", "gradinv"))
