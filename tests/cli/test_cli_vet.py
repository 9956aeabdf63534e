"""`medpfl vet` as a user runs it: verdicts, exit codes, references, and files that are no models."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crafted_models import body, medleak, mlp
from PIL import Image
from safetensors.torch import save_file

from medpfl.models import MODELS

Command = Callable[..., Any]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_an_honest_checkpoint_passes_in_every_format(medpfl: Command, tmp_path: Path) -> None:
    state = body(generator()).state_dict()
    torch.save(state, tmp_path / "plain.pt")
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "nested.pt")
    save_file(dict(state), tmp_path / "model.safetensors")
    np.savez(tmp_path / "arrays.npz", **{name: tensor.numpy() for name, tensor in state.items()})
    np.savez(tmp_path / "list.npz", *[tensor.numpy() for tensor in state.values()])
    for file in sorted(tmp_path.iterdir()):
        ended = medpfl("vet", file)
        assert ended.code == 0, ended
        assert "passed" in ended.out
        assert "Behavior was not checked" in ended.out
        assert "training code" in ended.out


def test_a_crafted_checkpoint_ends_with_1_and_names_the_layer(medpfl: Command, tmp_path: Path) -> None:
    torch.save(medleak(generator()).state_dict(), tmp_path / "round7.pt")
    ended = medpfl("vet", tmp_path / "round7.pt")
    assert ended.code == 1
    assert "crafted" in ended.out
    assert "first: 100% of 256 units look into one direction" in ended.out


def test_names_do_not_matter(medpfl: Command, tmp_path: Path) -> None:
    arrays = [tensor.numpy() for tensor in medleak(generator()).state_dict().values()]
    np.savez(tmp_path / "list.npz", *arrays)
    ended = medpfl("vet", tmp_path / "list.npz", "--json")
    assert ended.code == 1
    by_name = {row["check"]: row for row in json.loads(ended.out)["checks"]}
    assert by_name["proportional_rows"]["status"] == "found"


def test_json_says_what_was_and_was_not_checked(medpfl: Command, tmp_path: Path) -> None:
    torch.save(mlp(generator()).state_dict(), tmp_path / "mlp.pt")
    ended = medpfl("vet", tmp_path / "mlp.pt", "--json")
    assert ended.code == 1
    told = json.loads(ended.out)
    assert told["verdict"] == "leaks"
    assert told["behavior_checked"] is False
    assert told["not_covered"]
    by_name = {row["check"]: row for row in told["checks"]}
    assert by_name["other_tensors"]["status"] == "not checked"
    assert by_name["other_tensors"]["score"] is None


def test_a_reference_shows_what_was_added(medpfl: Command, tmp_path: Path) -> None:
    net = medleak(generator())
    torch.save(net.state_dict(), tmp_path / "now.pt")
    torch.save(net.body.state_dict(), tmp_path / "before.pt")  # type: ignore[union-attr]
    assert "'first.weight' is new" in medpfl("vet", tmp_path / "now.pt", "--reference", tmp_path / "before.pt").out


class Harmful:
    """Would write a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def test_code_in_a_file_is_never_run(medpfl: Command, tmp_path: Path) -> None:
    trace, good = tmp_path / "was-run", tmp_path / "good.pt"
    torch.save(body(generator()).state_dict(), good)
    torch.save({"weight": torch.zeros(2), "extra": Harmful(trace)}, tmp_path / "zip.pt")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Harmful(trace)))
    (tmp_path / "old.pkl").write_bytes(pickle.dumps(Harmful(trace), protocol=0))
    np.savez(tmp_path / "objects.npz", objects=np.array([Harmful(trace)], dtype=object))
    for name in ("zip.pt", "plain.pkl", "old.pkl", "objects.npz"):
        medpfl("vet", tmp_path / name).refused(name)
        medpfl("vet", good, "--reference", tmp_path / name).refused(name)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("empty.pt", b""),
        ("text.pt", b"not a model at all, only some text"),
        ("image.png", b"\x89PNG\r\n\x1a\n" + bytes(100)),
        ("broken.zip", b"PK\x03\x04" + bytes(200)),
        ("broken.safetensors", (50).to_bytes(8, "little") + b'{"weight":'),
    ],
)
def test_what_is_no_checkpoint_is_refused_in_one_sentence(
    medpfl: Command, tmp_path: Path, name: str, content: bytes
) -> None:
    (tmp_path / name).write_bytes(content)
    medpfl("vet", tmp_path / name).refused(name)


def test_missing_files_folders_and_numbers_that_are_not_finite_are_refused(medpfl: Command, tmp_path: Path) -> None:
    medpfl("vet", tmp_path / "nowhere.pt").refused("nowhere.pt' does not exist or is not a file")
    medpfl("vet", tmp_path).refused(f"{tmp_path.name}' does not exist or is not a file")
    torch.save({"fc.weight": torch.full((2, 2), float("nan"))}, tmp_path / "nan.pt")
    medpfl("vet", tmp_path / "nan.pt").refused("nan.pt", "'fc.weight'", "not finite")
    torch.save({"steps": torch.tensor(1)}, tmp_path / "counter.pt")
    medpfl("vet", tmp_path / "counter.pt").refused("counter.pt", "no weights")


def test_with_a_model_its_behavior_is_tried(medpfl: Command, tmp_path: Path) -> None:
    honest = MODELS["cnn_fedavg"].item((1, 28, 28), 3, generator())
    torch.save(honest.state_dict(), tmp_path / "honest.pt")
    ended = medpfl("vet", tmp_path / "honest.pt", "--model", "cnn_fedavg", "--json")
    assert ended.code == 0, ended
    told = json.loads(ended.out)
    assert told["behavior_checked"] is True
    assert "16 drawn images of shape (1, 28, 28)" in told["behavior"]
    assert {row["check"] for row in told["checks"] if row["about"] == "behavior" and row["status"] == "clear"} >= {
        "bins_at_work",
        "dead_layer",
        "one_image_dominates",
    }
    fishing = dict(honest.state_dict())
    fishing["fc.weight"] = torch.zeros_like(fishing["fc.weight"])
    fishing["fc.weight"][1] = 0.5
    fishing["fc.bias"] = torch.tensor([1000.0, 0.0, 1000.0])
    torch.save(fishing, tmp_path / "fishing.pt")
    ended = medpfl("vet", tmp_path / "fishing.pt", "--model", "cnn_fedavg")
    assert ended.code == 1
    assert "Behavior was checked" in ended.out
    assert "one class sends a gradient" in ended.out


FACTORY = """
import torch
from torch import nn

def make(channels, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(64 * channels, 32), nn.ReLU(), nn.Linear(32, classes))
"""


def test_a_factory_and_own_images(medpfl: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "vetted_factory.py").write_text(FACTORY)
    net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
    torch.save(net.state_dict(), tmp_path / "net.pt")
    (tmp_path / "own").mkdir()
    for place in range(6):
        pixels = np.random.default_rng(place).integers(0, 255, (8, 8)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "own" / f"{place}.png")
    options = ("--model", "vetted_factory:make", "--size", 8, "--channels", 1)
    ended = medpfl("vet", "net.pt", *options, "--images", tmp_path / "own", "--json")
    assert ended.code == 1, ended
    told = json.loads(ended.out)
    assert told["verdict"] == "leaks"
    assert "6 given images of shape (1, 8, 8)" in told["behavior"]
    medpfl("vet", "net.pt", "--model", "vetted_factory:make").refused("--channels")
    medpfl("vet", "net.pt", *options, "--images", tmp_path / "none").refused("none")
    medpfl("vet", "net.pt", *options, "--task", "multilabel").refused("multilabel", "multi_label")
    medpfl("vet", "net.pt", "--model", "vetted_factory:other").refused("other")
    medpfl("vet", "net.pt", "--size", 8).refused("--size", "--model")


def test_a_model_that_the_file_does_not_fit_is_found(medpfl: Command, tmp_path: Path) -> None:
    torch.save(MODELS["cnn3"].item((1, 32, 32), 3, generator()).state_dict(), tmp_path / "net.pt")
    ended = medpfl("vet", tmp_path / "net.pt", "--model", "lenet_dlg")
    assert ended.code == 1
    assert "does not fit model 'lenet_dlg'" in ended.out
    assert "Behavior was not checked" in ended.out
