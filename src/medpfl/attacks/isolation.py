"""A last layer that lets one image's gradient through, and that image's own gradient out of what arrives."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from medpfl.attacks.layers import DenseLayer, last_dense, layer_input
from medpfl.attacks.updates import gradient_view
from medpfl.core.domain import GlobalModel, Knowledge, Observation, Recipe, Update

TAIL = 10.0
"""The other classes' logit is at least so many times the largest auxiliary one of the hook's class."""

NO_SPREAD = 1e-12
"""Features that deviate less are the same for all images."""

SURE = 2.0
"""Shares that differ by no more than so many standard errors count as equal."""

LEAST_SIGNAL = 0.05
"""Images whose errors sum to less are taken for none."""


@dataclass(frozen=True)
class Hook:
    """A last layer of which only one class's row is not zero: images of that class pull at it, others do not.

    label: that class. row: (features,). others: the other classes' logit; the class's own bias is zero, which keeps its
    change clear of rounding. The softmax gives the class p = sigmoid(row * features - others - log(classes - 1)).
    """

    label: int
    row: Tensor
    others: float

    def in_place_of_last(self, model: GlobalModel) -> GlobalModel:
        """`model` with this last layer. A row of zeros shows no layer in front any gradient."""
        layer = last_of(model)
        assert layer.bias is not None  # `why_no_hook` refuses that
        weight = torch.zeros_like(model.parameters[layer.weight])
        weight[self.label] = self.row.to(weight)
        bias = torch.full_like(model.parameters[layer.bias], self.others)
        bias[self.label] = 0.0
        return replace(model, parameters={**model.parameters, layer.weight: weight, layer.bias: bias})


def class_hook(label: int, features: Tensor, strength: float, offset: float) -> Hook:
    """Fishing by class: the class's own logit is `offset` below the others', so that p is nearly zero for every image.

    An image of the class then has the error -1 in its row and all others have none, so that only this class's images
    send a gradient to the layers in front. features: auxiliary ones (M, features), which may raise the offset.
    """
    row = torch.full((features.shape[1],), strength, dtype=torch.float64)
    highest = float((features.double().cpu() @ row).abs().max()) if len(features) else 0.0
    return Hook(label, row, max(offset, TAIL * highest))


def feature_hook(label: int, classes: int, features: Tensor, images: int, sharpness: float, every: bool) -> Hook:
    """Fishing by feature, for a batch of one class: images above a cut have p near 1 and send nothing.

    features: (M, features) of auxiliary images of the class. The cut is the normal quantile at 1 / images, so that one
    image lies below it on average, of the sum of `every` feature, or of the one feature whose distribution is most normal
    (Kolmogorov and Smirnov's distance). p rises from 0 to 1 within a few deviations / sharpness; it is 1/2 at the cut.
    """
    count = features.shape[1]
    directions = torch.ones(count, 1, dtype=torch.float64) if every else torch.eye(count, dtype=torch.float64)
    values = features.double().cpu() @ directions
    mean, deviation = values.mean(dim=0), values.std(dim=0)
    place = int(_distance_from_normal(values, mean, deviation).argmin())
    cut = float(mean[place]) + float(deviation[place]) * float(torch.special.ndtri(torch.tensor(1 / images).double()))
    steepness = sharpness / float(deviation[place].clamp_min(NO_SPREAD))
    return Hook(label, steepness * directions[:, place], steepness * cut - math.log(classes - 1))


def features_of(model: GlobalModel, images: Tensor) -> Tensor:
    """What the last layer receives for images (N, C, *spatial): (N, features)."""
    with torch.no_grad():
        return layer_input(model, last_of(model), images)


def pulled(observation: Observation, label: int) -> float:
    """How many images' errors the hook's row holds, from its bias: a whole number where fishing by class worked."""
    layer = last_of(observation.model)
    assert layer.bias is not None
    return -observation.examples * float(gradient_view(observation).tensors[layer.bias][label])


def isolated(observation: Observation, label: int, whole: bool) -> Observation:
    """One image's own gradient, as if its client had sent nothing else, from an update whose hook one image pulled at.

    All layers in front have that image's gradient divided by the number of examples. whole: the hook's row shows that
    image alone, so that its last layer's gradient follows; otherwise the last layer counts as frozen.
    """
    model, layer = observation.model, last_of(observation.model)
    assert layer.bias is not None
    seen = gradient_view(observation).tensors
    own = {name: observation.examples * tensor for name, tensor in seen.items()}
    if whole:
        others = torch.full_like(own[layer.bias], -1 / (model.task.classes - 1))
        others[label] = 1.0
        own[layer.bias] = others * own[layer.bias][label]
        own[layer.weight] = others[:, None] * own[layer.weight][label]
    else:
        last = {layer.weight, layer.bias}
        own = {name: tensor for name, tensor in own.items() if name not in last}
        model = replace(
            model,
            parameters={name: tensor for name, tensor in model.parameters.items() if name not in last},
            constants={**model.constants, **{name: model.parameters[name] for name in last}},
        )
    sent = observation.update.trainable
    trainable = {name: own[name].to(sent[name].device) for name in sent if name in own}
    return replace(
        observation,
        model=model,
        update=Update("gradient", trainable, {}, {}, examples=1),
        recipe=Recipe(update="gradient", batch_size=1),
        knowledge=Knowledge(labels=torch.tensor([label])),
        clients=1,
        broadcast=None,
    )


def likeliest_alone(targets: Tensor, classes: int, images: int) -> int:
    """The class of which so many images most probably hold exactly one, by the shares among auxiliary targets (M,).

    The first of those whose shares are alike as far as a sample tells: where victims and auxiliary images come from one
    small collection, the rarest class among these is the most frequent one among those.
    """
    shares = torch.bincount(targets, minlength=classes).double() / len(targets)
    best = shares[(shares * (1 - shares) ** (images - 1)).argmax()]
    unsure = SURE * (best * (1 - best) / len(targets)).sqrt()
    return int(((shares - best).abs() <= unsure).int().argmax())


def why_no_hook(model: GlobalModel) -> str | None:
    """The reason why a model has no last layer that a hook can take the place of."""
    layer = last_dense(model)
    if model.task.name != "single_label":
        return "fishing needs a softmax over classes, one per image"
    if isinstance(layer, str):
        return layer
    if layer.bias is None:
        return f"the last layer '{layer.module}' has no bias, so that its row cannot be kept below the others"
    return None


def last_of(model: GlobalModel) -> DenseLayer:
    """The classification layer of a model that has one."""
    layer = last_dense(model)
    assert not isinstance(layer, str), layer
    return layer


def _distance_from_normal(values: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Largest distance of each column's distribution from the normal one of its mean and deviation (features,)."""
    count = len(values)
    expected = torch.special.ndtr((values.sort(dim=0).values - mean) / deviation.clamp_min(NO_SPREAD))
    places = torch.arange(count, dtype=torch.float64)[:, None]
    above, below = (places + 1) / count - expected, expected - places / count
    distance = torch.maximum(above, below).amax(dim=0)
    return torch.where(deviation > NO_SPREAD, distance, math.inf)
