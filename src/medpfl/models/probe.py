"""One look at a model at work: what it calls, in which order, and whether its forward pass is pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from medpfl.core.domain import GlobalModel
from medpfl.core.errors import ModelError


@dataclass(frozen=True)
class Layer:
    """A layer with tensors of its own, as it met its first input."""

    path: str
    module: nn.Module
    input_shape: tuple[int, ...]


@dataclass(frozen=True)
class Probe:
    """One forward pass of two random images in eval mode.

    functions: names of the PyTorch functions that were called. layers: layers with trainable or frozen tensors of
    their own, in the order of their first use. output: (2, classes), or (2, classes, *spatial) of a segmentation model.
    """

    functions: frozenset[str]
    layers: tuple[Layer, ...]
    output: Tensor


class _Recorder(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.names.add(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


def probe_images(model: GlobalModel, count: int = 2) -> Tensor:
    """Random images (count, *image_shape) in [0, 1], always the same ones."""
    return torch.rand((count, *model.image_shape), generator=torch.Generator().manual_seed(0))


def probe(model: GlobalModel) -> Probe:
    """Runs the model twice on the same two images.

    Raises `ModelError` if the forward pass raises, returns something else than finite outputs of the task's shape,
    gives different outputs for the same images, or changes its own tensors in eval mode.
    """
    images = probe_images(model)
    before = {**model.parameters, **model.buffers, **model.counters, **model.constants}
    copies = {name: tensor.clone() for name, tensor in before.items()}
    recorder = _Recorder()
    layers: dict[str, Layer] = {}
    with torch.random.fork_rng(devices=[]):
        with recorder, _noted(model.module, layers):
            output, buffers = _forward(model, images)
        _check_output(model, output)
        again, _ = _forward(model, images)
    if not torch.allclose(output, again, rtol=1e-3, atol=1e-5):
        raise ModelError(
            f"model '{model.name}' gives different outputs for the same images in eval mode: "
            "take the randomness out of its forward pass, because no attack or client step could be repeated"
        )
    changed = [name for name in before if not torch.equal(copies[name], {**before, **buffers}[name])]
    if changed:
        raise ModelError(
            f"model '{model.name}' changes its own tensor '{changed[0]}' during the forward pass in eval mode: "
            "keep no state that depends on the data, except in batch norm layers"
        )
    return Probe(frozenset(recorder.names), tuple(layers.values()), output)


@contextmanager
def _noted(module: nn.Module, layers: dict[str, Layer]) -> Iterator[None]:
    """Inside, layers with tensors of their own are noted in the order of their first use."""
    handles = [
        layer.register_forward_pre_hook(_noting(path, layers))
        for path, layer in module.named_modules()
        if next(layer.parameters(recurse=False), None) is not None
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _noting(path: str, layers: dict[str, Layer]) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def note(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        shape = tuple(inputs[0].shape) if inputs and isinstance(inputs[0], Tensor) else ()
        layers.setdefault(path, Layer(path, module, shape))

    return note


def _forward(model: GlobalModel, images: Tensor) -> tuple[Any, dict[str, Tensor]]:
    try:
        with torch.no_grad():
            return model.forward(images)
    except ModelError:
        raise
    except (Exception, SystemExit) as error:  # a user's forward pass may raise anything
        raise ModelError(
            f"model '{model.name}' cannot run on images of shape {tuple(model.image_shape)}: {summary_of(error)}"
        ) from error


def _check_output(model: GlobalModel, output: Any) -> None:
    expected = (2, *model.task.output_shape(model.image_shape))
    if not isinstance(output, Tensor):
        raise ModelError(
            f"model '{model.name}' returns {type(output).__name__}, expected a tensor of class scores: "
            "wrap it in a module that returns the class scores only"
        )
    if tuple(output.shape) != expected:
        raise ModelError(
            f"model '{model.name}' maps 2 images to an output of shape {tuple(output.shape)}, expected {expected}: "
            f"it must give one output for each of the {model.task.classes} classes"
            + (" and each pixel" if len(expected) > 2 else "")
        )
    if not output.is_floating_point():
        raise ModelError(f"model '{model.name}' returns {output.dtype}, expected floating-point class scores")
    if not bool(torch.isfinite(output).all()):
        raise ModelError(f"model '{model.name}' returns numbers that are not finite: check its weights")


def summary_of(error: BaseException) -> str:
    """Kind and first sentence of another's exception, for the end of a message.

    >>> summary_of(RuntimeError("no central directory. This is an internal error."))
    'RuntimeError: no central directory'
    """
    lines = str(error).strip().splitlines()
    if not lines:
        return type(error).__name__
    return f"{type(error).__name__}: {lines[0].partition('. ')[0].removesuffix('.')[:300]}"
