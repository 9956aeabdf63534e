"""One-run audit of a client: canary images that were in its batch or not, and what its update says of which."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from medpfl.core.domain import Batch, GlobalModel, Tensors
from medpfl.core.errors import InputError
from medpfl.core.mechanisms import ClippedSteps
from medpfl.core.recipes import Recipe
from medpfl.core.seeding import generator
from medpfl.core.tasks import SingleLabel
from medpfl.defenses import Defense
from medpfl.federation.client import client_step
from medpfl.metrics.privacy import LowerBound, Statement, one_run_audit, one_run_gaussian_audit, state
from medpfl.models import prepare


@dataclass(frozen=True)
class CanaryAudit:
    """What a client's defense promises for one round, and what a one-run audit shows that it cannot fall below.

    general: lower bound on epsilon for any mechanism. gaussian: the tighter one for normal noise. A lower bound above the
    promise means that the client does not do what it says.
    """

    promised: Statement
    general: LowerBound
    gaussian: LowerBound

    @property
    def broken(self) -> bool:
        """Whether the promise is refuted."""
        return max(self.general.epsilon, self.gaussian.epsilon) > self.promised.epsilon


class _Amplified(nn.Module):
    """Multiplies by a hundred, so that every canary's gradient exceeds any clipping norm in use."""

    def forward(self, images: Tensor) -> Tensor:
        return 100.0 * images


def worst_case(count: int, classes: int = 2) -> tuple[GlobalModel, Batch]:
    """A linear model and so many canaries that do not disturb each other: one bright pixel each.

    Differential privacy must hold for every model that a server sends and for every image, so an audit may choose both.
    Ordinary images in ordinary models have nearly the same gradients, and hardly any of them can be told from the sum.
    """
    side = max(8, math.isqrt(count - 1) + 1)
    layer = nn.Linear(side * side, classes, bias=False)
    nn.init.zeros_(layer.weight)
    model = prepare(
        nn.Sequential(_Amplified(), nn.Flatten(), layer),
        name="canaries",
        image_shape=(1, side, side),
        task=SingleLabel(classes),
    )
    images = torch.eye(side * side)[:count].reshape(count, 1, side, side)
    return model, Batch(images, torch.arange(count) % classes)


def audit_client(
    defense: Defense,
    model: GlobalModel,
    canaries: Batch,
    recipe: Recipe,
    *,
    delta: float = 1e-5,
    confidence: float = 0.95,
    runs: int = 1,
    seed: int = 0,
) -> CanaryAudit:
    """Trains one client round in which each of the canaries (m images) takes part by a fair coin, and guesses the coins.

    The attacker of the audit knows everything but the coins: model, recipe, defense, every canary and its clipped
    gradient. Its score of a canary is the best linear estimate of that canary's coin from the released update, the
    others taken into account (they would drown it otherwise, because gradients are alike). More steps are read as their
    sum, so a small learning rate keeps gradients the same in all of them.

    runs: so many rounds with new canaries each (the same images with new coins) count as one run with as many times
    the canaries, because each of them takes part in one of the rounds only.
    `recipe`: `gradient`, or `delta` of plain SGD; its batch size is set to the number of canaries, which DP-SGD divides by
    whoever takes part, so that no step is sampled. Raises InputError where the defense promises nothing per image or its clipping is not known.
    """
    mechanism = defense.mechanism()
    number = len(canaries)
    recipe = replace(recipe, batch_size=number, images=None)
    guarantee = defense.guarantee(recipe, number)
    if guarantee is None or guarantee.unit != "image" or not isinstance(mechanism, ClippedSteps):
        raise InputError(
            "a one-run audit needs a defense that clips each image's gradient and has a guarantee per image"
        )
    gradients = _clipped_gradients(model, canaries, mechanism)
    steps = 1 if recipe.update == "gradient" else recipe.epochs * recipe.local_steps
    unit = 1.0 if recipe.update == "gradient" else -recipe.learning_rate * steps
    noise = mechanism.noise_multiplier * mechanism.bound / steps**0.5
    scores: list[float] = []
    included: list[bool] = []
    for run in range(runs):
        coins = torch.rand(number, generator=generator("canary coins", seed, run)) < 0.5
        held = Batch(canaries.images[coins], canaries.targets[coins])
        own = replace(recipe, images=len(held))
        update, _ = client_step(model, held, own, hooks=defense, generator=generator("canary client", seed, run))
        released = _joined(update.trainable) * number / unit
        scores += _coin_estimates(gradients, released, noise).tolist()
        included += coins.tolist()
    return CanaryAudit(
        promised=state(guarantee, rounds=1, delta=delta),
        general=one_run_audit(scores, included, delta=delta, confidence=confidence),
        gaussian=one_run_gaussian_audit(scores, included, delta=delta, confidence=confidence),
    )


def _clipped_gradients(model: GlobalModel, canaries: Batch, mechanism: ClippedSteps) -> Tensor:
    """Each canary's own gradient as the client clips it, (m, entries), float64."""
    rows = []
    for number in range(len(canaries)):
        one = Batch(canaries.images[number : number + 1], canaries.targets[number : number + 1])
        update, _ = client_step(model, one, Recipe(precision="float64"), generator=generator("canary", number))
        row = _joined(update.trainable)
        rows.append(row * min(1.0, mechanism.bound / float(row.norm())))
    return torch.stack(rows)


def _coin_estimates(gradients: Tensor, released: Tensor, noise: float) -> Tensor:
    """Linear least-mean-squares estimates of coins c from sum_i c_i g_i + N(0, noise^2), up to a constant."""
    gram = gradients @ gradients.T
    centered = gradients @ (released - 0.5 * gradients.sum(dim=0))
    damped = gram + 4 * noise**2 * torch.eye(len(gram), dtype=gram.dtype)
    estimates: Tensor = torch.linalg.solve(damped, centered)
    return estimates


def _joined(tensors: Tensors) -> Tensor:
    return torch.cat([tensor.reshape(-1).double() for tensor in tensors.values()])
