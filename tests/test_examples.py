"""The example specs are valid and hold the papers' settings."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from medpfl.audit.grid import Cell, cells, refusal
from medpfl.audit.spec import Spec, parse_spec
from medpfl.audit.trained_models import training_kind
from medpfl.core.seeding import content_hash
from medpfl.core.tasks import SingleLabel
from medpfl.models import build_model

FOLDER = Path(__file__).parents[1] / "examples"
PAPER = ("medpfl_cpl", "medpfl_dlg", "medpfl_idlg", "medpfl_gradinv", "medpfl_noise")


def plain_spec(name: str) -> dict[str, Any]:
    """An example as plain values, with phantoms in place of the images that a user brings."""
    plain: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    for entry in plain["data"]:
        assert entry.pop("path").endswith(entry["name"])
        entry["reader"] = "phantom"
    return plain


def example(name: str) -> Spec:
    return parse_spec(plain_spec(name), base=FOLDER)


def grid(name: str) -> list[Cell]:
    return cells(example(name))


@pytest.mark.parametrize("name", [variant for paper in PAPER for variant in (paper, f"{paper}_reduced")])
def test_every_example_is_valid_and_no_cell_is_refused(name: str) -> None:
    found = grid(name)
    assert [refusal(cell) for cell in found] == [None] * len(found)
    assert {cell.dataset.id for cell in found} == {"brain_mri", "covid_cxr", "melanoma"}
    assert all(cell.dataset.settings.channels == 3 for cell in found)


@pytest.mark.parametrize("name", PAPER)
def test_the_reduced_example_differs_in_budget_only(name: str) -> None:
    full, reduced = grid(name), grid(f"{name}_reduced")
    assert {cell.model.params["source"] for cell in full} == {cell.model.params["source"] for cell in reduced}
    assert {cell.model.state for cell in full} == {cell.model.state for cell in reduced}
    assert {cell.attack.name for cell in full} == {cell.attack.name for cell in reduced}
    assert {cell.defense.name for cell in full} == {cell.defense.name for cell in reduced}
    assert max(cell.attack.params["iterations"] for cell in reduced) <= 100


def test_cpl_starts_after_one_adam_step() -> None:
    for cell in grid("medpfl_cpl"):
        training = cell.model.training
        assert cell.model.name == "lenet_cpl"
        assert training is not None
        assert (training.steps, training.batch_size, training.optimizer, training.learning_rate) == (
            1,
            32,
            "adam",
            0.01,
        )
        assert (cell.dataset.settings.size, cell.dataset.settings.aspect) == (32, "squash")
        assert (cell.attack.params["iterations"], cell.attack.params["restarts"]) == (300, 1)


def test_dlg_keeps_one_net_and_idlg_draws_one_for_each_image() -> None:
    for name, state in (("dlg", "untrained"), ("idlg", "untrained_per_victim")):
        for cell in grid(f"medpfl_{name}"):
            assert (cell.model.name, cell.model.state) == (f"lenet_{name}", state)
            assert (cell.dataset.settings.size, cell.dataset.settings.aspect) == (32, "crop")
            assert cell.attack.params["iterations"] == 300
    assert {cell.attack.params["stop_below"] for cell in grid("medpfl_idlg")} == {1e-6}


def test_gradinv_is_given_the_labels_and_says_so() -> None:
    for cell in grid("medpfl_gradinv"):
        assert (cell.model.name, cell.model.classes, cell.dataset.settings.size) == ("resnet18", 1000, 224)
        assert cell.model.normalize is not None
        assert cell.oracle == "labels"
        chosen = {key: cell.attack.params[key] for key in ("iterations", "restarts", "layers", "total_variation")}
        assert chosen == {"iterations": 24_000, "restarts": 8, "layers": "top10", "total_variation": 1e-6}


def test_the_commented_entries_of_gradinv_are_valid_where_the_weights_are() -> None:
    text = (FOLDER / "medpfl_gradinv.yaml").read_text(encoding="utf-8")
    head, entries = text.split("\nmodels:\n")
    switched = re.sub(r"^# (- |  )", r"  \1", entries, flags=re.MULTILINE)
    plain = yaml.safe_load(f"{head}\nmodels:\n{switched}")
    for entry in plain["data"]:
        del entry["path"]
        entry["reader"] = "phantom"
    trained = [cell for cell in cells(parse_spec(plain, base=FOLDER)) if cell.model.state == "imagenet"]
    assert len(trained) == 3
    for cell in trained:
        assert (cell.attack.params["layers"], cell.attack.params["total_variation"]) == ("all", 0.1)
        assert cell.attack.params["median_filter_every"] == 0


def test_noise_has_the_published_scales_budgets_and_images() -> None:
    found = grid("medpfl_noise")
    rates = {
        (cell.dataset.id, round(1 / cell.defense.params["scale"], 2))
        for cell in found
        if cell.defense.name == "laplace"
    }
    assert rates == {
        ("brain_mri", 100),
        *(("covid_cxr", rate) for rate in (100, 200, 300, 400)),
        *(("melanoma", rate) for rate in (200, 300, 400)),
    }
    for cell in found:
        assert cell.dataset.settings.victims == 1
        assert cell.model.name == "lenet_dlg"
        assert cell.attack.name == "cpl"
        assert cell.attack.params["iterations"] == (300 if cell.defense.name == "none" else 100)


def test_reduced_noise_compares_equal_budgets() -> None:
    found = grid("medpfl_noise_reduced")
    assert len(found) == 15
    assert len({str(cell.attack.params) for cell in found}) == 1


def test_training_stages_are_stages_of_one_training_and_diagnosed() -> None:
    spec = example("training_stages")
    assert spec.diagnose is not None
    for net in ("lenet_idlg", "cnn3"):
        stages = [entry for entry in spec.models if entry.name == net]
        lengths = [0 if entry.training is None else entry.training.length for entry in stages]
        assert lengths == [0, 1, 5, 20]
        assert len({content_hash(training_kind(entry)) for entry in stages[1:]}) == 1
    assert [refusal(cell) for cell in grid("training_stages")] == [None] * 8


@pytest.mark.shared_data
@pytest.mark.parametrize("name", [variant for paper in PAPER for variant in (paper, f"{paper}_reduced")])
def test_the_examples_read_real_images(name: str, shared_data: Path) -> None:
    plain = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    for entry in plain["data"]:
        entry["path"] = str(shared_data / entry["name"])
    for data in parse_spec(plain, base=FOLDER).data:
        assert len(data.reader.class_names()) in (2, 3, 4)


def test_the_segmentation_example_searches_masks_and_is_given_them_on_the_same_victims() -> None:
    plain = yaml.safe_load((FOLDER / "segmentation.yaml").read_text(encoding="utf-8"))
    found = cells(parse_spec(plain, base=FOLDER))
    assert [refusal(cell) for cell in found] == [None] * 8
    assert {(cell.attack.id, cell.oracle) for cell in found} == {("masks_searched", ""), ("masks_given", "masks")}
    settings = [{key: value for key, value in cell.attack.params.items() if key != "masks"} for cell in found]
    assert all(one == settings[0] for one in settings)


def test_realistic_clients_are_batches_and_shuffled_local_training() -> None:
    found = grid("realistic_clients")
    assert [refusal(cell) for cell in found] == [None] * len(found)
    recipes = {cell.recipe.id: cell.recipe.recipe for cell in found}
    assert {recipe.batch_size for recipe in recipes.values()} == {2, 8}
    shuffled = [cell for cell in found if cell.recipe.recipe.shuffle]
    assert {cell.attack.params.get("order") for cell in shuffled if cell.attack.name == "fedavg_inversion"} == {
        "known",
        "separate",
    }
    assert {cell.dataset.settings.channels for cell in found} == {1, 3}


def test_the_medleak_example_reads_through_every_channel_and_is_not_refused() -> None:
    plain = yaml.safe_load((FOLDER / "medleak.yaml").read_text(encoding="utf-8"))
    found = cells(parse_spec(plain, base=FOLDER))
    assert [refusal(cell) for cell in found] == [None] * 12
    ways = {(cell.channel.name, cell.attack.params["mode"]) for cell in found}
    assert ways >= {(name, mode) for name in ("secure_sum", "secagg_plus") for mode in ("separate", "joint")}
    assert {cell.recipe.recipe.private_images for cell in found} == {16, 64}


MEDLEAK = {
    "medleak_medmnist": ({"pneumoniamnist", "isic2017", "mednist"}, {16, 64}),
    "medleak_medmnist_phantom": ({"films", "skin", "brain"}, {16, 64}),
    "medleak_224": ({"covid_cxr", "brain_mri", "melanoma"}, {8}),
    "medleak_224_phantom": ({"films"}, {8}),
    "medleak_own": ({"own"}, {64, 256}),
}


@pytest.mark.parametrize("name", MEDLEAK)
def test_medleak_on_published_kinds_of_images_is_not_refused(name: str) -> None:
    """Every setting meets MedLeak; the plain recipe stands beside it, except on the user's own images."""
    datasets, batches = MEDLEAK[name]
    plain = yaml.safe_load((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    for entry in plain["data"]:
        if entry.pop("path", None) is not None:
            entry["reader"] = "phantom"
    found = cells(parse_spec(plain, base=FOLDER))
    assert [refusal(cell) for cell in found] == [None] * len(found)
    assert {cell.dataset.id for cell in found} == datasets
    assert {cell.recipe.recipe.private_images for cell in found} == batches
    assert {cell.channel.name for cell in found} == {"plain", "secagg_plus"}
    calibrated = {(cell.dataset.id, cell.recipe.id) for cell in found if cell.attack.params["scale"] == "auto"}
    published = {(cell.dataset.id, cell.recipe.id) for cell in found if cell.attack.params["scale"] == 1}
    assert published <= calibrated
    assert bool(published) == (name != "medleak_own")
    assert {cell.dataset.settings.size for cell in found if "224" in name} <= {224}


def test_the_relatives_of_medleak_are_not_refused_on_the_same_rounds() -> None:
    plain = yaml.safe_load((FOLDER / "crafted_relatives.yaml").read_text(encoding="utf-8"))
    found = cells(parse_spec(plain, base=FOLDER))
    assert [refusal(cell) for cell in found] == [None] * len(found)
    used = {cell.attack.name for cell in found}
    assert used == {"medleak", "robbing_the_fed", "curious_abandon_honesty", "fishing", "loki", "scale_mia"}


def test_medleak_against_clients_of_all_kinds_is_not_refused_and_some_servers_may_choose_more() -> None:
    found = cells(
        parse_spec(yaml.safe_load((FOLDER / "medleak_clients.yaml").read_text(encoding="utf-8")), base=FOLDER)
    )
    assert [refusal(cell) for cell in found] == [None] * len(found)
    assert {cell.recipe.id for cell in found} == {"momentum", "adam", "bfloat16", "five-steps"}
    assert {"recipe" in cell.threat_model.can for cell in found} == {True, False}
    assert {cell.channel.name for cell in found if "whose" in cell.attack.id} == {"secagg_plus"}


def test_the_frontier_attacks_every_setting_twice_and_prices_it() -> None:
    spec = example("frontier_brain")
    found = grid("frontier_brain")
    assert [refusal(cell) for cell in found] == [None] * len(found)
    known = {cell.defense.id for cell in found if cell.adaptive}
    assert known == {cell.defense.id for cell in found if not cell.adaptive} - {"none"}
    assert spec.utility is not None
    assert spec.utility.seeds == 3
    assert str(spec.limit) == "gain_psnr <= 2"


def test_attackers_who_know_the_noise_have_equal_budgets() -> None:
    found = cells(parse_spec(yaml.safe_load((FOLDER / "known_noise.yaml").read_text(encoding="utf-8")), base=FOLDER))
    assert [refusal(cell) for cell in found] == [None] * len(found)
    model = build_model("lenet_dlg", image_shape=(1, 32, 32), task=SingleLabel(2), generator=torch.Generator())
    assert all(280 <= cell.attack.attack.evaluations(model, 1) <= 300 for cell in found)
