"""Factories of users: found, called with what they accept, and refused with the reason."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest
import torch

from medpfl.core.domain import GlobalModel
from medpfl.core.errors import ModelError
from medpfl.core.tasks import SingleLabel
from medpfl.models import build_model

FACTORIES = """
import torch
from torch import nn

calls = {}

def dense(inputs, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, classes))

def everything(image_shape, channels, size, classes, generator):
    calls.update(image_shape=image_shape, channels=channels, size=size, classes=classes)
    net = dense(channels * size * size, classes)
    nn.init.uniform_(net[1].weight, generator=generator)
    return net

def usual_names(in_channels=3, num_classes=10, width=4, **others):
    assert not others
    return nn.Sequential(nn.Conv2d(in_channels, width, 1), nn.AdaptiveAvgPool2d(1), dense(width, num_classes))

class Net(nn.Sequential):
    def __init__(self, *, image_shape, classes=5):
        super().__init__(nn.Flatten(), nn.Linear(image_shape[0] * image_shape[1] * image_shape[2], classes))

class Zoo:
    @staticmethod
    def small(classes):
        return dense(64, classes)

def needy(depth):
    return dense(64, 2)

def raising():
    raise RuntimeError("weights are on the other disk\\nand more")

def ten_classes():
    return dense(64, 10)

def text():
    return "a net"

constant = 3
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a user's modules."""
    (tmp_path / "factories_of_a_user.py").write_text(textwrap.dedent(FACTORIES))
    (tmp_path / "broken_module_of_a_user.py").write_text("def (")
    (tmp_path / "importing_module_of_a_user.py").write_text("import a_package_that_is_missing")
    return tmp_path


def build(factory: str, folder: Path | None, seed: int = 0) -> GlobalModel:
    """A model of two classes for 8x8 grey images."""
    return build_model(
        factory,
        image_shape=(1, 8, 8),
        task=SingleLabel(2),
        generator=torch.Generator().manual_seed(seed),
        search_path=[folder] if folder else [],
    )


def test_factories_get_the_arguments_that_they_name(folder: Path) -> None:
    model = build("factories_of_a_user:everything", folder)
    assert sys.modules["factories_of_a_user"].calls == {
        "image_shape": (1, 8, 8), "channels": 1, "size": 8, "classes": 2,
    }  # fmt: skip
    assert model.name == "factories_of_a_user:everything"
    assert model.parameters["1.weight"].min() >= 0


@pytest.mark.parametrize("name", ["usual_names", "Net", "Zoo.small"])
def test_classes_and_other_signatures_work(folder: Path, name: str) -> None:
    assert build(f"factories_of_a_user:{name}", folder).forward(torch.rand(3, 1, 8, 8))[0].shape == (3, 2)


def test_initialization_depends_on_the_generator_only(folder: Path) -> None:
    before = torch.get_rng_state()
    models = [build("factories_of_a_user:usual_names", folder, seed) for seed in (1, 1, 2)]
    assert torch.equal(before, torch.get_rng_state())
    weights = [model.parameters["0.weight"] for model in models]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_search_path_is_not_left_behind(folder: Path) -> None:
    before = list(sys.path)
    build("factories_of_a_user:Net", folder)
    with pytest.raises(ModelError):
        build("factories_of_a_user:raising", folder)
    assert sys.path == before


@pytest.mark.parametrize(
    ("factory", "words"),
    [
        ("factories_of_a_user:raising", "raised RuntimeError: weights are on the other disk$"),
        ("factories_of_a_user:text", "returned str, expected a torch.nn.Module"),
        ("factories_of_a_user:needy", "needs an argument 'depth'"),
        ("factories_of_a_user:ten_classes", r"\(2, 10\), expected \(2, 2\)"),
        ("factories_of_a_user:missing", "has no 'missing'"),
        ("factories_of_a_user:constant", "is int, which cannot be called"),
        ("factories_of_a_user:", "not of the form"),
        ("package_nobody_has:net", "no module 'package_nobody_has'"),
        ("broken_module_of_a_user:net", "cannot be imported: SyntaxError"),
        ("importing_module_of_a_user:net", "no module 'a_package_that_is_missing'"),
    ],
)
def test_what_goes_wrong_is_said_in_one_sentence_that_names_the_factory(folder: Path, factory: str, words: str) -> None:
    with pytest.raises(ModelError, match=words) as error:
        build(factory, folder)
    assert factory in str(error.value)
    assert "\n" not in str(error.value)
