"""Which recipes can be carried out on which model under which defense, and why not."""

from __future__ import annotations

from medpfl.core.domain import GlobalModel, Recipe
from medpfl.federation.hooks import NO_HOOKS, Hooks


def check_recipe(recipe: Recipe, model: GlobalModel | None = None, hooks: Hooks = NO_HOOKS) -> list[str]:
    """Sentences that say why a client cannot train as `recipe` says; empty if it can.

    >>> from medpfl.core.domain import Recipe
    >>> check_recipe(Recipe(update="gradient", local_steps=2))[0]
    'update: gradient is one gradient of one batch, found local_steps: 2 and epochs: 1; use update: delta or weights'
    """
    problems: list[str] = []
    if recipe.update == "gradient" and (recipe.local_steps > 1 or recipe.epochs > 1):
        problems.append(
            f"update: gradient is one gradient of one batch, found local_steps: {recipe.local_steps} "
            f"and epochs: {recipe.epochs}; use update: delta or weights"
        )
    fewest = recipe.batch_size * (recipe.local_steps - 1) + 1
    most = recipe.batch_size * recipe.local_steps
    if not fewest <= recipe.private_images <= most:
        problems.append(
            f"images: {recipe.private_images} does not fill local_steps: {recipe.local_steps} of "
            f"batch_size: {recipe.batch_size}; between {fewest} and {most} images do"
        )
    if recipe.accumulation > recipe.batch_size:
        problems.append(
            f"accumulation: {recipe.accumulation} micro-batches cannot be made of batch_size: {recipe.batch_size}; "
            "use at most one micro-batch per image"
        )
    if not all(0 <= beta < 1 for beta in recipe.betas):
        problems.append(f"betas: both must be at least 0 and below 1, found {list(recipe.betas)}")
    if model is not None and hooks.clips_per_example and recipe.batch_norm == "train" and has_batch_norm(model):
        problems.append(
            "the defense needs per-example gradients, which do not exist with batch_norm: train because an image's "
            "gradient then depends on the others; compose group_norm before the defense, which puts group norm in place "
            "of batch norm, or use batch_norm: eval"
        )
    return problems if model is None else [*problems, *hooks.refusals(model, recipe)]


def has_batch_norm(model: GlobalModel) -> bool:
    """Whether the model has a batch norm layer."""
    return any(getattr(layer, "functional_batch_norm", False) for layer in model.module.modules())
