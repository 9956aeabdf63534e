"""What a single image's update says about the model's output error, and the loss that starts from it.

For one image the gradient of the last bias is the derivative d of the loss by the outputs (softmax(output) - label for
cross entropy), and every other gradient follows from it by the chain rule. Searching with d as observed, not with the
candidate's own softmax(output) - label, takes away the plateaus of candidates that the model is sure of. It is also
what remains of a joint search for image and soft label once the label that fits the bias best, softmax(output) - d,
is put in for each image.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from medpfl.attacks.layers import DenseLayer, last_dense, why_no_single_input
from medpfl.attacks.matching.problem import Problem
from medpfl.attacks.updates import gradient_view
from medpfl.core.devices import CPU, moved
from medpfl.core.domain import GlobalModel, Observation
from medpfl.core.tasks import Task

NOT_ONE_IMAGE = 1e-3
"""Largest share of the last weight's gradient (norms) that may be left after its part along the bias' gradient."""


@dataclass(frozen=True)
class FromError:
    """A loss whose derivative by the outputs is the target itself: sum(output * target)."""

    classes: int
    name: str = "from_error"

    def output_shape(self, image_shape: tuple[int, ...]) -> tuple[int, ...]:
        """One output per class."""
        return (self.classes,)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Inner product of outputs and targets, both (N, classes)."""
        return (output * target.to(output.dtype)).sum()

    def encode(self, labels: Tensor) -> Tensor:
        """Errors are targets already."""
        return labels


def output_error(observation: Observation) -> Tensor | None:
    """The derivative of the loss by the outputs (classes,), float64 on the CPU; None where the update does not show it.

    It shows for one image, a gradient that is known exactly, and a model that ends with a dense layer with a bias.
    The last weight's gradient must then be the product of this error and one feature vector, which noise or pruning
    would break.
    """
    observation = moved(observation, CPU)
    layer = last_dense(observation.model)
    if observation.examples != 1 or not isinstance(layer, DenseLayer) or layer.bias is None:
        return None
    view = gradient_view(observation)
    error, weight = view.tensors[layer.bias], view.tensors[layer.weight]
    if not view.exact or not bool(error.any()) or why_no_single_input(observation.model, layer) is not None:
        return None
    features = error @ weight / error.square().sum()
    if float((weight - torch.outer(error, features)).norm()) > NOT_ONE_IMAGE * float(weight.norm()):
        return None
    return error if ends_there(observation.model, layer.bias) else None


def typical_error(error: Tensor) -> Tensor:
    """Errors (V, classes) of the same signs and norms, the same for all of one sign: negative ones equal, others too.

    >>> typical_error(torch.tensor([[-0.9, 0.8, 0.1]])).sum().abs() < 1e-6
    tensor(True)
    """
    negative = error < 0
    shares = [mask / mask.sum(dim=1, keepdim=True).clamp_min(1) for mask in (~negative, negative)]
    balanced = shares[0] - shares[1]
    typical: Tensor = balanced * (error.norm(dim=1, keepdim=True) / balanced.norm(dim=1, keepdim=True))
    return typical


def soft_label(task: Task, output: Tensor, error: Tensor) -> Tensor:
    """The soft label (classes,) with which an image with these outputs has this output error."""
    if task.name == "multi_label":
        return output.sigmoid() - len(error) * error
    return output.softmax(dim=-1) - error


def with_known_error(problem: Problem) -> Problem:
    """The same problem for candidates that are given output errors (V, 1, classes) in place of labels."""
    models = {id(model): replace(model, task=FromError(model.task.classes)) for model in problem.models}
    return replace(problem, models=tuple(models[id(model)] for model in problem.models))


def ends_there(model: GlobalModel, bias: str) -> bool:
    """Whether the outputs move as the last bias does, so that nothing comes after the layer."""
    dtype = model.parameters[bias].dtype
    images = torch.full((1, *model.image_shape), 0.5, dtype=dtype)
    direction = torch.linspace(-1.0, 1.0, model.task.classes, dtype=dtype)

    def outputs(entries: Tensor) -> Tensor:
        return model.forward(images, parameters={**model.parameters, bias: entries})[0][0]

    before, after = outputs(model.parameters[bias]), outputs(model.parameters[bias] + direction)
    return after.shape == direction.shape and bool(torch.allclose(after - before, direction, atol=1e-3))
