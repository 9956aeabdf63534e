"""From anybody's `nn.Module` to a `GlobalModel` that can be trained functionally."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from medpfl.core.domain import GlobalModel
from medpfl.core.errors import ModelError
from medpfl.core.tasks import Task
from medpfl.models.batch_norm import TREATED, replace_batch_norm
from medpfl.models.normalization import Normalization, Wrapped
from medpfl.models.probe import probe, summary_of


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
    eval mode (dropout is off), and everything floating becomes float32. Parameters that require a gradient are the
    model's `parameters`; frozen ones and buffers outside the state dict are `constants`, which no update contains;
    other floating buffers are `buffers`, integer and boolean ones `counters`. A tensor with several names (tied
    weights) appears once, under its first name. With `normalize`, or if the model contains attention, the names of
    all tensors get the prefix `body.`.

    Raises `ModelError` if a layer cannot be treated, or if the module does not map images (N, *image_shape) to finite
    outputs (N, task.classes), always the same for the same images.
    """
    reason = why_untreatable(module)
    if reason is not None:
        raise ModelError(f"model '{name}' cannot be audited: {reason}")
    if normalize is not None:
        normalize.check(image_shape[0], f"model '{name}'")
    whole = _functional_copy(module, name)
    attention = any(isinstance(layer, nn.MultiheadAttention) for layer in whole.modules())
    model = _split(_wrapped(whole, normalize, attention), name, image_shape, task)
    seen = probe(model)
    if not attention and "scaled_dot_product_attention" in seen.functions:
        model = _split(_wrapped(whole, normalize, True), name, image_shape, task)
    return model


def why_untreatable(module: nn.Module) -> str | None:
    """The reason why `module` cannot be trained functionally; None if it can.

    >>> why_untreatable(nn.Sequential(nn.LSTM(4, 2)))
    "layer '0' is recurrent (LSTM), and PyTorch cannot batch recurrent layers over clients"
    """
    if isinstance(module, torch.jit.ScriptModule):
        return "it is TorchScript, whose tensors cannot be exchanged; give the Python module that it was made from"
    for path, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if is_lazy(tensor):
            return f"'{path}' has no shape yet; run the module once on an image before"
        if tensor.is_complex():
            return f"'{path}' is complex; only real tensors can be audited"
        if tensor.is_quantized or tensor.layout != torch.strided:
            return f"'{path}' is quantized or sparse; only dense floating-point tensors can be audited"
    for path, layer in module.named_modules():
        where = f"layer '{path}'" if path else "the model itself"
        if isinstance(layer, nn.DataParallel | nn.parallel.DistributedDataParallel):
            return f"{where} is {type(layer).__name__}; give the module inside it"
        if isinstance(layer, nn.RNNBase | nn.RNNCellBase):
            return (
                f"{where} is recurrent ({type(layer).__name__}), and PyTorch cannot batch recurrent layers over clients"
            )
        if isinstance(layer, _InstanceNorm) and layer.track_running_stats:
            return f"{where} is instance norm with running statistics; use track_running_stats=False"
        if isinstance(layer, _BatchNorm) and type(layer) not in TREATED:
            return f"{where} is {type(layer).__name__}, a batch norm layer of its own kind; use nn.BatchNorm2d or alike"
        if isinstance(layer, nn.EmbeddingBag | nn.Embedding) and layer.sparse:
            return f"{where} has sparse gradients; use sparse=False"
    return None


def _functional_copy(module: nn.Module, name: str) -> nn.Module:
    try:
        copied = copy.deepcopy(module)
    except (RuntimeError, TypeError, AttributeError) as error:
        raise ModelError(f"model '{name}' cannot be copied: {summary_of(error)}") from error
    copied = replace_batch_norm(copied).eval()
    for layer in copied.modules():
        if getattr(layer, "inplace", False) is True:
            vars(layer)["inplace"] = False
    return copied


def _wrapped(body: nn.Module, normalize: Normalization | None, attention: bool) -> nn.Module:
    return body if normalize is None and not attention else Wrapped(body, normalize)


def _split(module: nn.Module, name: str, image_shape: tuple[int, ...], task: Task) -> GlobalModel:
    kept = set(module.state_dict(keep_vars=True))
    parameters: dict[str, Tensor] = {}
    buffers: dict[str, Tensor] = {}
    counters: dict[str, Tensor] = {}
    constants: dict[str, Tensor] = {}
    for key, parameter in module.named_parameters():
        (parameters if parameter.requires_grad else constants)[key] = _copied(parameter)
    for key, buffer in module.named_buffers():
        sent = buffers if buffer.is_floating_point() else counters
        (sent if key in kept else constants)[key] = _copied(buffer)
    if not parameters:
        raise ModelError(f"model '{name}' has no trainable parameter, so its clients send nothing: unfreeze a layer")
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


def _copied(tensor: Tensor) -> Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to("cpu", dtype, copy=True)
