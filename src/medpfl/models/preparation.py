"""From anybody's `nn.Module` to a `GlobalModel` that can be trained functionally."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from medpfl.core.domain import GlobalModel
from medpfl.core.errors import ModelError
from medpfl.core.tasks import Task
from medpfl.models.batch_norm import replace_batch_norm
from medpfl.models.normalization import Normalization, Normalized


def prepare(
    module: nn.Module,
    *,
    name: str,
    image_shape: tuple[int, ...],
    task: Task,
    normalize: Normalization | None = None,
) -> GlobalModel:
    """Makes a `GlobalModel` of a copy of `module`; the module itself stays as it is.

    Batch norm layers take their functional form, in-place activations write to new memory, all other layers are in
    eval mode, and everything floating becomes float32. Parameters that require a gradient are the model's
    `parameters`; frozen ones and buffers outside the state dict are `constants`, which no update contains; other
    floating buffers are `buffers`, integer and boolean ones `counters`. With `normalize` the names of all tensors get
    the prefix `body.`. Raises `ModelError` if a layer cannot be treated, or if the module does not map images
    (N, *image_shape) to outputs (N, task.classes).
    """
    _refuse_untreatable(module, name)
    if normalize is not None:
        normalize.check(image_shape[0])
    copied = replace_batch_norm(copy.deepcopy(module)).eval()
    for layer in copied.modules():
        if getattr(layer, "inplace", False) is True:
            layer.inplace = False
    whole = copied if normalize is None else Normalized(normalize, copied)
    model = _split(whole, name, image_shape, task)
    _check_output(model)
    return model


def _split(module: nn.Module, name: str, image_shape: tuple[int, ...], task: Task) -> GlobalModel:
    kept = set(module.state_dict(keep_vars=True))
    parameters: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    counters: dict[str, Tensor] = {}
    constants: dict[str, Tensor] = {}
    for key, parameter in module.named_parameters():
        (parameters if parameter.requires_grad else constants)[key] = _float32(parameter)
    for key, buffer in module.named_buffers():
        if not buffer.is_floating_point():
            (counters if key in kept else constants)[key] = buffer.detach().clone()
        else:
            (buffers if key in kept else constants)[key] = _float32(buffer)
    if not parameters:
        raise ModelError(f"model '{name}' has no trainable parameter, so its clients send nothing: unfreeze a layer")
    module.requires_grad_(False)
    return GlobalModel(
        name=name,
        module=module,
        parameters=parameters,
        buffers=buffers,
        counters=counters,
        task=task,
        image_shape=tuple(image_shape),
        constants=constants,
    )


def _float32(tensor: Tensor) -> Tensor:
    return tensor.detach().to(torch.float32, copy=True) if tensor.is_floating_point() else tensor.detach().clone()


def _refuse_untreatable(module: nn.Module, name: str) -> None:
    for key, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if is_lazy(tensor):
            raise ModelError(f"model '{name}': '{key}' has no shape yet: run the module once on an image before")


def _check_output(model: GlobalModel) -> None:
    images = torch.full((2, *model.image_shape), 0.5)
    with torch.no_grad():
        output, _ = model.forward(images)
    if tuple(output.shape) != (2, model.task.classes):
        raise ModelError(
            f"model '{model.name}' maps 2 images to an output of shape {tuple(output.shape)}, "
            f"expected (2, {model.task.classes}): its last layer must have one output per class"
        )
