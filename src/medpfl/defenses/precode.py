"""PRECODE: a variational bottleneck in front of the classifier."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from medpfl.core.config import STRICT
from medpfl.core.domain import GlobalModel, Recipe, Tensors
from medpfl.core.mechanisms import Mechanism, StochasticLayer
from medpfl.core.seeding import generator as stream
from medpfl.defenses.base import DEFENSES, Defense
from medpfl.federation.hooks import Step
from medpfl.models.bottleneck import NOISE, bottleneck_of, classifier, moments, what_reaches, with_bottleneck


@DEFENSES.register(
    "precode",
    summary="the model gets a variational bottleneck before its classifier; clients draw its noise, nobody else knows it",
    paper="Scheliga, Maeder, Seeland: PRECODE - A Generic Model Extension to Prevent Deep Gradient Leakage, WACV 2022 "
    "(arXiv 2108.04725)",
    limits="layers in front of the bottleneck are sent as they are: attackers who match those only, or read an earlier "
    "dense layer out, are not stopped; changes the model for everybody; no privacy guarantee",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class Precode(Defense):
    """Features h become z = mean(h) + softplus(spread(h)) * e with e from N(0, I), fresh for every image and step, and then
    features again; `weight` times KL(N(mean, deviation^2) || N(0, I)) in bits, summed over z, is added to the loss.

    The server's model has e = 0.
    """

    adaptive_attack: ClassVar[Mapping[str, Any]] = {"name": "gradinv", "distance": "likelihood"}
    reads_images: ClassVar[bool] = True

    width: Annotated[int, Field(ge=1, description="size of z")] = 256
    weight: Annotated[float, Field(ge=0, description="weight of the Kullback-Leibler divergence in the loss")] = 1e-3

    def model(self, model: GlobalModel) -> GlobalModel:
        """The model with the bottleneck; the same for everybody who calls it."""
        path = classifier(model)
        if path is None or bottleneck_of(model) is not None:
            return model
        return with_bottleneck(model, path, self.width, stream("precode", model.name, self.width))

    def gradient(self, step: Step, generator: torch.Generator) -> Tensors:
        """The gradient of the loss with fresh noise and the divergence."""
        path = bottleneck_of(step.model)
        if path is None or not len(step.batch):
            return step.gradients
        drawn = torch.randn(len(step.batch), self.width, dtype=torch.float64, generator=generator)
        like = step.batch.images
        constants = {**step.model.constants, f"{path}.{NOISE}": drawn.to(like.device, like.dtype)}
        noisy = replace(step.model, constants=constants)

        def loss(parameters: dict[str, Tensor]) -> Tensor:
            with what_reaches(noisy, path) as features:
                output, _ = noisy.forward(step.batch.images, parameters=parameters, batch_norm=step.recipe.batch_norm)
            weight, bias = parameters[f"{path}.encoder.weight"], parameters[f"{path}.encoder.bias"]
            mean, deviation = moments(torch.nn.functional.linear(features[-1], weight, bias))
            return noisy.task.loss(output, step.batch.targets) + self.weight * divergence(mean, deviation)

        gradients: dict[str, Tensor] = torch.func.grad(loss)(dict(step.model.parameters))
        return gradients

    def mechanism(self) -> Mechanism:
        """Noise inside the model."""
        return StochasticLayer()

    def refusals(self, model: GlobalModel, recipe: Recipe) -> list[str]:
        """Models without a dense classifier, half precision."""
        if classifier(model) is None:
            return [f"precode goes before a dense classifier, and '{model.name}' has none; use another defense"]
        if recipe.precision in ("float16", "bfloat16"):
            return [f"precode computes its gradient in float32; found precision: {recipe.precision}"]
        return []

    def warnings(self) -> tuple[str, ...]:
        """No guarantee."""
        return (
            "PRECODE hides what lies behind its noise: there is no formal guarantee, and the layers before it are sent as "
            "they are",
        )


def divergence(mean: Tensor, deviation: Tensor) -> Tensor:
    """KL(N(mean, deviation^2) || N(0, I)) in bits, summed over the last axis, mean over images.

    >>> float(divergence(torch.zeros(2, 3), torch.ones(2, 3)))
    0.0
    """
    nats = 0.5 * (mean.square() + deviation.square() - 1.0 - 2.0 * deviation.log()).sum(dim=-1)
    return nats.mean() / math.log(2.0)
