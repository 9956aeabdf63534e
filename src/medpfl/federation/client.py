"""The client step: one pure function, used by clients and by attackers that simulate them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from medpfl.core.domain import Batch, ClientState, GlobalModel, Recipe, Tensors, Update
from medpfl.core.errors import ModelError, SpecError
from medpfl.federation.gradients import StepGradient, finished_gradient, step_gradient
from medpfl.federation.hooks import NO_HOOKS, Hooks, Step
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
    steps: Sequence[Tensor] | None = None,
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
    the randomness of orders and defense, fresh from the operating system if None. steps: the places of the images
    that each local step takes, over all epochs, in place of the recipe's and the defense's own: as `drawn_steps` gave
    them, or for an attacker who supposes an order or other images in every epoch. Raises `SpecError` if the recipe or
    the defense cannot be carried out, `ModelError` if the images do not fit the model.
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
    state = state or ClientState()
    hooks = hooks.in_round(state.rounds)
    if steps is None:
        steps = drawn_steps(batch, recipe, hooks, generator)
    dtype = torch.float64 if recipe.precision == "float64" else torch.float32
    start = model.to(dtype)
    batch = replace(batch, images=batch.images.to(dtype))
    if recipe.update == "gradient":
        update = _gradient_update(start, batch, recipe, hooks, generator, steps)
    else:
        update = _trained_update(start, batch, recipe, hooks, generator, steps)
    update, state = hooks.update(update, start, state, generator)
    return update, replace(state, rounds=state.rounds + 1)


def drawn_steps(batch: Batch, recipe: Recipe, hooks: Hooks, generator: torch.Generator) -> tuple[Tensor, ...]:
    """The places of the images that each local step takes, over all epochs, as the defense or else the recipe says.

    The recipe's steps take the images in order, or with `shuffle` in an order that every epoch draws anew. Raises
    `SpecError` if the client holds too few or too many images.
    """
    held, wanted = len(batch), recipe.batch_size * recipe.local_steps
    if recipe.update != "gradient" and not wanted - recipe.batch_size < held <= wanted:
        raise SpecError(
            f"recipe: local_steps: {recipe.local_steps} of batch_size: {recipe.batch_size} take "
            f"{wanted - recipe.batch_size + 1} to {wanted} images, but the client holds {held}"
        )
    device = batch.images.device
    chosen = hooks.steps(held, recipe, generator)
    if chosen is not None:
        return tuple(places.to(device) for places in chosen)
    if recipe.update == "gradient":
        return (torch.arange(held, device=device),)
    if not recipe.shuffle:
        return torch.split(torch.arange(held, device=device), recipe.batch_size) * recipe.epochs
    orders = [torch.randperm(held, generator=generator).to(device) for _ in range(recipe.epochs)]
    return tuple(places for order in orders for places in torch.split(order, recipe.batch_size))


def _taken(batch: Batch, places: Tensor) -> Batch:
    return Batch(batch.images[places], batch.targets[places])


def _gradient_update(
    model: GlobalModel,
    batch: Batch,
    recipe: Recipe,
    hooks: Hooks,
    generator: torch.Generator,
    steps: Sequence[Tensor],
) -> Update:
    step_batch = hooks.batch(_taken(batch, steps[0]), model, generator)
    result = _finite_gradient(model, step_batch, recipe, hooks, generator)
    sends_statistics = recipe.batch_norm == "train"
    return Update(
        kind="gradient",
        trainable=finished_gradient(Step(model, step_batch, recipe, result.gradients), hooks, generator),
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
    steps: Sequence[Tensor],
) -> Update:
    model, local = start, start_local(start, recipe)
    for places in steps:
        model, local, _ = local_step(model, _taken(batch, places), recipe, local, hooks=hooks, generator=generator)
    trainable: Tensors = model.parameters
    if recipe.update == "delta":
        trainable = {name: tensor - start.parameters[name] for name, tensor in model.parameters.items()}
    return Update(
        kind=recipe.update,
        trainable=trainable,
        buffers=model.buffers,
        counters=model.counters,
        examples=len(batch),
    )
