"""Whether matching attacks can run at all: gradients of gradients, double precision, batching over clients."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from medpfl.core.domain import GlobalModel
from medpfl.core.tasks import MultiLabel
from medpfl.models.inspection import VALIDATORS, Finding, Inspection
from medpfl.models.probe import probe_images, summary_of

CANNOT = (RuntimeError, NotImplementedError, TypeError, ValueError)
"""What PyTorch raises where a derivative, a precision or batching is missing."""


BELOW_ROUNDING = 1e-20
"""Squared gradients below this are rounding, and so are their differences."""


@VALIDATORS.register("derivatives", summary="second derivatives, batching and double precision must work")
def derivatives(inspection: Inspection) -> Iterator[Finding]:
    """Tries what matching attacks do: gradients of gradients, float64, and batching over clients."""
    model = inspection.model
    image = probe_images(model, 1)
    try:
        finite = bool(torch.isfinite(_second_derivative(model, image)).all())
    except CANNOT as error:
        yield Finding(
            "not_twice_differentiable",
            "refusal",
            f"the model cannot be differentiated twice ({summary_of(error)}): no matching attack can run, so an audit "
            "would only show weak ones",
        )
        return
    if not finite:
        yield Finding(
            "second_derivative_not_finite",
            "warning",
            "second derivatives of the model are not finite on random images: matching attacks break down without this "
            "being protection",
        )
    try:
        agrees = _agrees_with_differences(model.to(torch.float64), image.double())
    except CANNOT as error:
        yield Finding(
            "no_float64",
            "warning",
            f"the model does not run in float64 ({summary_of(error)}): L-BFGS attacks stall early in float32",
        )
    else:
        if not agrees:
            yield Finding(
                "second_derivative_wrong",
                "warning",
                "second derivatives disagree with finite differences, as with custom or once-differentiable gradients: "
                "matching attacks walk in wrong directions and break down without this being protection",
            )
    try:
        torch.func.vmap(lambda batch: _second_derivative(model, batch))(probe_images(model, 2)[:, None])
    except CANNOT as error:
        yield Finding(
            "no_batching",
            "warning",
            f"PyTorch cannot batch the model over clients ({summary_of(error)}): defenses that need per-example "
            "gradients cannot run on it, and attacks take one victim at a time",
        )


def _gradient_norm(model: GlobalModel, images: Tensor) -> Tensor:
    """The squared norm of the parameter gradient, as a matching objective depends on it."""
    task = model.task
    undecided = 0.5 if isinstance(task, MultiLabel) else 1 / task.classes
    targets = torch.full((len(images), *task.output_shape(model.image_shape)), undecided)  # no output saturates this

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return task.loss(model.forward(images, parameters=parameters)[0], targets)

    gradients = torch.func.grad(loss)(dict(model.parameters))
    return torch.stack([gradient.square().sum() for gradient in gradients.values()]).sum()


def _second_derivative(model: GlobalModel, images: Tensor) -> Tensor:
    """Gradient in the images of the squared norm of the parameter gradient."""
    second: Tensor = torch.func.grad(lambda changed: _gradient_norm(model, changed))(images)
    return second


def _agrees_with_differences(model: GlobalModel, images: Tensor) -> bool:
    """Whether second derivatives along eight random directions are those of central differences, to 1 percent.

    One step size that agrees is enough for a direction: larger ones may cross the kinks of piecewise linear
    activations.
    """
    generator = torch.Generator().manual_seed(1)
    if float(_gradient_norm(model, images)) < BELOW_ROUNDING:
        return True
    gradient = _second_derivative(model, images)
    return all(
        _agrees_along(model, images, gradient, torch.randn(images.shape, generator=generator, dtype=images.dtype))
        for _ in range(8)
    )


def _agrees_along(model: GlobalModel, images: Tensor, gradient: Tensor, direction: Tensor) -> bool:
    slope = float((gradient * direction).sum())
    for step in (1e-6, 1e-7, 1e-8):
        with torch.no_grad():
            ahead, behind = (float(_gradient_norm(model, images + sign * step * direction)) for sign in (1, -1))
        difference = (ahead - behind) / (2 * step)
        rounding = 1e-14 * abs(ahead) / step
        if abs(slope - difference) <= 0.01 * max(abs(slope), abs(difference)) + rounding:
            return True
    return False
