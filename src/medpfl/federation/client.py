"""The client step: one pure function, used by clients and by attackers that simulate them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from medpfl.core.domain import Batch, ClientState, GlobalModel, Recipe, Tensors, Update
from medpfl.core.errors import ModelError, SpecError
from medpfl.federation.gradients import StepGradient, clip_gradients, step_gradient
from medpfl.federation.hooks import NO_HOOKS, Hooks
from medpfl.federation.local import LossScale, all_finite, local_step, start_local
from medpfl.federation.recipes import check_recipe


def client_step(
    model: GlobalModel,
    batch: Batch,
    recipe: Recipe,
    *,
    hooks: Hooks = NO_HOOKS,
    state: ClientState | None = None,
    generator: torch.Generator | None = None,
    orders: Sequence[Tensor] | None = None,
) -> tuple[Update, ClientState]:
    """Trains `model` on `batch` as `recipe` says and returns what is sent. Pure and differentiable in the images.

    batch: the client's private images (N, *model.image_shape), in order: local step k takes images
    [k * batch_size, (k + 1) * batch_size), every epoch repeats the same steps; with `shuffle` every epoch draws a new
    order of the images first. With `update: gradient` all images make one batch and the update holds the gradient of their mean loss after clipping, and buffers and counters only with
    `batch_norm: train`; `delta` and `weights` hold all buffers and counters as they are after training.

    The optimizer starts anew in every round. Everything is computed in float32, or float64 if the recipe says so;
    float16 and bfloat16 are autocast. In float16 a `gradient` is computed at the largest loss scale, from 65536
    downwards, at which it is finite (so it cannot run under vmap), while local steps skip what overflows.

    Double backward, `torch.func.vmap` over clients and outer gradients work. hooks: the client's defense. generator:
    the randomness of orders and defense, fresh from the operating system if None. orders: one per epoch, the places
    of the images that it takes, in order; in place of the recipe's own, for an attacker who supposes an order or
    other images in every epoch. Raises `SpecError` if the recipe cannot be
    carried out, `ModelError` if the images do not fit the model.
    """
    problems = check_recipe(recipe, model, hooks)
    if problems:
        raise SpecError(f"recipe: {problems[0]}")
    if tuple(batch.images.shape[1:]) != tuple(model.image_shape):
        found = tuple(batch.images.shape[1:])
        raise ModelError(f"model '{model.name}' takes images of shape {tuple(model.image_shape)}, found {found}")
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    if orders is None:
        orders = drawn_orders(batch, recipe, generator)
    held, wanted = len(orders[0]), recipe.batch_size * recipe.local_steps
    if recipe.update != "gradient" and not wanted - recipe.batch_size < held <= wanted:
        raise SpecError(
            f"recipe: local_steps: {recipe.local_steps} of batch_size: {recipe.batch_size} take "
            f"{wanted - recipe.batch_size + 1} to {wanted} images, but the client holds {held}"
        )
    dtype = torch.float64 if recipe.precision == "float64" else torch.float32
    start = hooks.model(model).to(dtype)
    batch = replace(batch, images=batch.images.to(dtype))
    if recipe.update == "gradient":
        update = _gradient_update(start, batch, recipe, hooks, generator)
    else:
        update = _trained_update(start, batch, recipe, hooks, generator, orders)
    update, state = hooks.update(update, state or ClientState(), generator)
    return update, replace(state, rounds=state.rounds + 1)


def drawn_orders(batch: Batch, recipe: Recipe, generator: torch.Generator) -> list[Tensor]:
    """The order in which every epoch takes the images: as they are, or drawn anew."""
    images, device = len(batch), batch.images.device
    if not recipe.shuffle or recipe.update == "gradient":
        return [torch.arange(images, device=device)] * recipe.epochs
    return [torch.randperm(images, generator=generator).to(device) for _ in range(recipe.epochs)]


def _gradient_update(
    model: GlobalModel, batch: Batch, recipe: Recipe, hooks: Hooks, generator: torch.Generator
) -> Update:
    step_batch = hooks.batch(batch, generator)
    result = _finite_gradient(model, step_batch, recipe, hooks, generator)
    gradients: Tensors = result.gradients
    if recipe.gradient_clip is not None:
        gradients = clip_gradients(gradients, recipe.gradient_clip)
    sends_statistics = recipe.batch_norm == "train"
    return Update(
        kind="gradient",
        trainable=gradients,
        buffers=result.model.buffers if sends_statistics else {},
        counters=result.model.counters if sends_statistics else {},
        examples=len(batch),
    )


def _finite_gradient(
    model: GlobalModel, batch: Batch, recipe: Recipe, hooks: Hooks, generator: torch.Generator
) -> StepGradient:
    if recipe.precision != "float16":
        return step_gradient(model, batch, recipe, hooks=hooks, generator=generator)
    scale = LossScale.on(model.device).factor
    while True:
        result = step_gradient(model, batch, recipe, hooks=hooks, generator=generator, loss_scale=scale)
        if scale <= 1 or bool(all_finite(result.gradients)):
            return result
        scale = scale / 2


def _trained_update(
    start: GlobalModel,
    batch: Batch,
    recipe: Recipe,
    hooks: Hooks,
    generator: torch.Generator,
    orders: Sequence[Tensor],
) -> Update:
    model, local = start, start_local(start, recipe)
    for order in orders:
        for chosen in torch.split(order, recipe.batch_size):
            step_batch = Batch(batch.images[chosen], batch.targets[chosen])
            model, local, _ = local_step(model, step_batch, recipe, local, hooks=hooks, generator=generator)
    trainable: Tensors = model.parameters
    if recipe.update == "delta":
        trainable = {name: tensor - start.parameters[name] for name, tensor in model.parameters.items()}
    return Update(
        kind=recipe.update,
        trainable=trainable,
        buffers=model.buffers,
        counters=model.counters,
        examples=len(orders[0]),
    )
