"""Models by name: from the zoo, or from anybody's factory."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medpfl.core.domain import GlobalModel
from medpfl.core.errors import ModelError
from medpfl.core.tasks import Task
from medpfl.models.factories import imported, searched_first
from medpfl.models.normalization import Normalization
from medpfl.models.preparation import prepare
from medpfl.models.probe import summary_of
from medpfl.models.randomness import isolated_randomness
from medpfl.models.registry import MODELS


def build_model(
    name: str,
    *,
    image_shape: tuple[int, ...],
    task: Task,
    normalize: Normalization | None = None,
    generator: torch.Generator,
    search_path: Sequence[Path] = (),
) -> GlobalModel:
    """An initialized model of the zoo (`resnet18`) or of a factory (`package.module:callable`).

    A factory is called with those of these keyword arguments that its signature names: `image_shape` (C, *spatial),
    `channels` or `in_channels`, `size` (one number if all sides are equal, else a tuple), `classes` or `num_classes`,
    `generator`. Without `generator` it draws from PyTorch's global generator, which is seeded for it and restored
    afterwards. `search_path`: folders that are searched first for its package.

    Raises `SpecError` for an unknown name and `ModelError` if the factory cannot be imported or called, or if what it
    returns cannot be audited.
    """
    if ":" in name:
        module = _made_by_factory(name, image_shape, task.classes, generator, search_path)
    else:
        module = MODELS[name].item(image_shape, task.classes, generator)
    return prepare(module, name=name, image_shape=image_shape, task=task, normalize=normalize)


def _made_by_factory(
    name: str, image_shape: tuple[int, ...], classes: int, generator: torch.Generator, search_path: Sequence[Path]
) -> nn.Module:
    with searched_first(search_path):
        factory = imported(name, search_path)
        arguments = _accepted_arguments(name, factory, image_shape, classes, generator)
        with isolated_randomness(generator):
            try:
                module = factory(**arguments)
            except (Exception, SystemExit) as error:  # a user's factory may raise anything
                raise ModelError(f"factory '{name}' raised {summary_of(error)}") from error
    if not isinstance(module, nn.Module):
        raise ModelError(f"factory '{name}' returned {type(module).__name__}, expected a torch.nn.Module")
    return module


def _accepted_arguments(
    name: str, factory: Callable[..., Any], image_shape: tuple[int, ...], classes: int, generator: torch.Generator
) -> dict[str, Any]:
    sides = set(image_shape[1:])
    offered: dict[str, Any] = {
        "image_shape": image_shape,
        "channels": image_shape[0],
        "in_channels": image_shape[0],
        "size": image_shape[1] if len(sides) == 1 else tuple(image_shape[1:]),
        "classes": classes,
        "num_classes": classes,
        "generator": generator,
    }
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError):
        return {}
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    taken: dict[str, Any] = {}
    for parameter in signature.parameters.values():
        keyword = parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        if keyword and parameter.name in offered:
            taken[parameter.name] = offered[parameter.name]
        elif parameter.default is parameter.empty and parameter.kind not in variadic:
            raise ModelError(
                f"factory '{name}' needs an argument '{parameter.name}' that is not known here: "
                f"give it a default; known are {', '.join(offered)}"
            )
    return taken
