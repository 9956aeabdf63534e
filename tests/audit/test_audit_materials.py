"""What cases are made of: the same for the same spec whatever surrounds it, and just what was granted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from medpfl.attacks import cpl
from medpfl.audit import execute, run_audit
from medpfl.audit.clients_needed import clients_needed
from medpfl.audit.context import describe
from medpfl.audit.grid import cells
from medpfl.audit.materials import Materials
from medpfl.audit.plan import Plan
from medpfl.audit.preparation import prepare
from medpfl.audit.rounds import client_round
from medpfl.audit.spec import parse_spec
from medpfl.core.errors import StoreError

EVERYTHING = ["labels", "logits", "masks", "batch_norm_statistics", "auxiliary", "defense"]
DATA = {"name": "brain", "reader": "phantom", "size": 32, "count": 96, "victims": 2}


def test_a_trained_model_does_not_depend_on_the_threads_of_the_process(tmp_path: Path) -> None:
    plain: dict[str, Any] = {"data": [DATA], "models": [{"name": "lenet_dlg", "state": {"trained": {"epochs": 2}}}]}
    spec = parse_spec(plain, base=tmp_path)
    (cell,) = cells(spec)
    before = torch.get_num_threads()
    trained = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            materials = prepare(spec, tmp_path / str(threads), Plan()).materials
            trained.append(materials.model(cell, 0).parameters)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])


def _observed(base: Path, attack: dict[str, Any] | None = None) -> tuple[Any, Any, torch.Tensor]:
    plain: dict[str, Any] = {
        "attacks": [attack or {"name": "cpl"}],
        "data": [{**DATA, "size": 16}],
        "models": [{"name": "resnet18_cifar"}],
        "recipes": [{"batch_size": 3, "batch_norm": "train"}],
        "threat_models": [{"name": "honest_server", "knows": EVERYTHING}],
    }
    spec = parse_spec(plain, base=base)
    (cell,) = cells(spec)
    materials = Materials(spec, base / "cache", clients_needed([cell]))
    truth = materials.truth(cell, 0, 1)
    update = client_round(materials, cell, 0, 1)
    return cell, execute._observe(materials, cell, 0, 1, update), truth.images


def test_an_attack_gets_the_batch_statistics_that_it_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpl.CPL, "uses", lambda _: frozenset({"batch_norm_statistics"}))
    cell, observation, images = _observed(tmp_path)
    statistics = observation.knowledge.batch_norm_statistics
    first = torch.nn.functional.conv2d(images, observation.model.parameters["conv1.weight"], padding=1)
    torch.testing.assert_close(statistics["bn1.mean"], first.mean(dim=(0, 2, 3)))
    torch.testing.assert_close(statistics["bn1.variance"], first.var(dim=(0, 2, 3), correction=0))
    assert cell.oracle == "batch_norm_statistics"
    assert observation.knowledge.labels is None


@pytest.mark.parametrize("source", ["auto", "given", "recovered", "running", "none"])
def test_gradinversion_is_given_the_oracle_only_where_its_setting_reads_it(source: str, tmp_path: Path) -> None:
    attack = {"name": "gradinversion", "iterations": 1, "restarts": 1, "batch_norm_statistics": source}
    cell, observation, _ = _observed(tmp_path, attack)
    reads = source in ("auto", "given")
    assert cell.oracle == ("batch_norm_statistics" if reads else "")
    assert (observation.knowledge.batch_norm_statistics is not None) == reads


def test_nothing_is_handed_out_or_named_that_the_attack_does_not_read(tmp_path: Path) -> None:
    cell, observation, _ = _observed(tmp_path)
    assert cell.oracle == ""
    assert not cell.adaptive
    assert all(value is None for value in vars(observation.knowledge).values())


@pytest.mark.parametrize(("batch_size", "said"), [(1, False), (4, True)])
def test_the_report_says_that_batches_are_balanced(batch_size: int, said: bool, tmp_path: Path) -> None:
    plain: dict[str, Any] = {"data": [DATA], "recipes": [{"batch_size": batch_size}]}
    spec = parse_spec(plain, base=tmp_path)
    prepared = prepare(spec, tmp_path / "cache", Plan())
    titles = [entry["title"] for entry in describe(spec, prepared.cells, prepared.materials)["assumptions"]]
    assert ("Balanced clients" in titles) is said


def test_another_data_entry_as_auxiliary_knowledge_is_listed_without_the_victims_patients(tmp_path: Path) -> None:
    """Phantoms of one seed and number of patients draw the same people, here in other poses."""
    drawn = {"reader": "phantom", "size": 16, "seed": 4, "patients": 12}
    plain: dict[str, Any] = {
        "data": [
            {**drawn, "name": "here", "count": 24, "victims": 3, "near_duplicates": 1.0},
            {**drawn, "name": "there", "count": 36, "victims": 0},
        ],
        "threat_models": [{"name": "honest_server", "knows": [{"auxiliary": "there"}]}],
    }
    spec = parse_spec(plain, base=tmp_path)
    prepared = prepare(spec, tmp_path / "cache", Plan())
    (cell,) = prepared.cells
    auxiliary = prepared.materials.auxiliary(cell, 0)
    assert auxiliary is not None
    here, there = describe(spec, prepared.cells, prepared.materials)["data"]
    assert (here["dataset"], here["victims"]) == ("here", 3)
    assert (there["dataset"], there["images"], there["victims"]) == ("there", 36, 0)
    assert (there["dropped_by_patient"], there["near_duplicates"]) == (9, 0)
    assert there["auxiliary"] == len(auxiliary.images) == 27
    assert "attack 'here'" in there["notes"][0]


@pytest.mark.parametrize(
    ("folder", "named"), [("here", "here/s0"), ("there", "there as auxiliary knowledge for here/s0")]
)
def test_changed_images_are_refused(folder: str, named: str, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 16, 16), dtype=np.uint8)
    for index, image in enumerate(pixels):
        name = tmp_path / ("here" if index < 12 else "there") / "ab"[index % 2] / f"{index}.png"
        name.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(name)
    image = {"reader": "folder", "size": 16, "channels": 1}
    data = [
        {**image, "name": name, "path": f"./{name}", "victims": count} for name, count in (("here", 2), ("there", 0))
    ]
    plain: dict[str, Any] = {
        "data": data,
        "models": [{"name": "lenet_dlg"}],
        "threat_models": [{"name": "honest_server", "knows": [{"auxiliary": "there"}]}],
        "attacks": [{"name": "cpl", "iterations": 1}],
    }
    spec = parse_spec(plain, base=tmp_path)
    run_audit(spec, tmp_path / "out", workers=0)
    assert run_audit(spec, tmp_path / "out", workers=0).counts["done"] == 2
    Image.fromarray(255 - pixels[0 if folder == "here" else 12]).save(
        tmp_path / folder / "a" / f"{0 if folder == 'here' else 12}.png"
    )
    with pytest.raises(StoreError, match=rf"{named} are not those"):
        run_audit(spec, tmp_path / "out", workers=0)
