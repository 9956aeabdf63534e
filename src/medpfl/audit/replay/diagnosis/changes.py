"""Controlled changes of a recorded update, for those who own the truth: one condition at a time, then all together.

An update under a changed condition is what the client's step would have given there, with all that the recorded update
has beyond the client's step (noise, scaling) left on it as it is. The change `clean_update` takes that away.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import torch

from medpfl.attacks.base import Attack
from medpfl.audit.diagnosis import ALL, RECIPE_CHANGES
from medpfl.audit.replay.diagnosis.agreement import Agreement, step_of
from medpfl.audit.replay.diagnosis.subject import Subject
from medpfl.core.domain import GlobalModel, Observation, Recipe, Tensors, Update
from medpfl.federation.changes import sent_change, with_change
from medpfl.federation.recipes import has_batch_norm
from medpfl.metrics.truth import GroundTruth

AXIS = {
    "labels_given": "attack",
    "recipe_known": "threat_model",
    "clean_update": "defense",
    "batch_norm_eval": "recipe",
    "plain_gradient": "recipe",
    "batch_size_1": "recipe",
    "untrained": "model",
    "plain_channel": "channel",
}
"""What can be changed, and the axis of the tables that it changes."""


@dataclass(frozen=True)
class Owned:
    """An update with its truth. groups: the images of each client that is in it, the victim's first."""

    subject: Subject
    groups: tuple[GroundTruth, ...]
    agreement: Agreement | str

    @property
    def truth(self) -> GroundTruth:
        """All images, in order."""
        return joined(self.groups)


def joined(groups: Sequence[GroundTruth]) -> GroundTruth:
    """The images of several clients as one."""
    if len(groups) == 1:
        return groups[0]
    return GroundTruth(
        torch.cat([group.images for group in groups]),
        torch.cat([group.labels for group in groups]),
        tuple(item for group in groups for item in group.items),
    )


def possible(one: Owned, attack: Attack) -> tuple[str, ...]:
    """The changes that make a difference to this attack on this update, in the order in which they are told."""
    found = [name for name in AXIS if _applies(name, one, attack)]
    return (*found, ALL) if len(found) > 1 else tuple(found)


def _applies(name: str, one: Owned, attack: Attack) -> bool:
    subject, agreed = one.subject, one.agreement
    if name == "labels_given":
        return subject.model.task.name != "segmentation" and attack.told("labels") is not None
    if isinstance(agreed, str):
        return False
    if name == "recipe_known":
        return agreed.found
    if name == "clean_update":
        return not agreed.agrees
    if name == "untrained":
        return _differ(subject.fresh, subject.model)
    if name == "plain_channel":
        return len(one.groups) > 1
    if name == "batch_norm_eval" and not has_batch_norm(subject.model):
        return False
    return RECIPE_CHANGES[name](agreed.recipe) is not None


def _differ(one: GlobalModel, other: GlobalModel) -> bool:
    return any(not torch.equal(tensor, other.parameters[name]) for name, tensor in one.parameters.items())


def changed(
    one: Owned, names: Collection[str], observation: Observation
) -> tuple[Observation, tuple[GroundTruth, ...]]:
    """What the attack would have seen under these changes instead of `observation`, and the images behind it.

    Raises InputError where the client's step cannot be carried out so.
    """
    recipe = told = observation.recipe
    groups = one.groups[:1] if "plain_channel" in names else one.groups
    model, update = one.subject.model, observation.update
    if not isinstance(one.agreement, str):
        recipe = one.agreement.recipe
        told = recipe if "recipe_known" in names else told
        recipe, told = _recipe(recipe, names), None if told is None else _recipe(told, names)
        if {"batch_size_1", "plain_gradient"} & set(names):
            groups = tuple(group.part(range(min(len(group.images), _images(recipe)))) for group in groups)
        model = replace(one.subject.fresh, task=model.task) if "untrained" in names else model
        if set(names) - {"labels_given", "recipe_known"}:
            update = _update(one.agreement, model, groups, recipe, clean="clean_update" in names)
    if told is not None and told.update != update.kind:
        told = replace(told, update=update.kind)
    labels = torch.cat([group.labels for group in groups]) if "labels_given" in names else None
    defense = None if "clean_update" in names else observation.knowledge.defense
    return (
        replace(
            observation,
            model=model,
            update=update,
            recipe=told,
            clients=len(groups) if "plain_channel" in names else observation.clients,
            knowledge=replace(observation.knowledge, labels=labels, defense=defense),
        ),
        groups,
    )


def _recipe(recipe: Recipe, names: Collection[str]) -> Recipe:
    for name in RECIPE_CHANGES:
        if name in names:
            recipe = RECIPE_CHANGES[name](recipe) or recipe
    return recipe


def _images(recipe: Recipe) -> int:
    """How many of a client's images, the first ones, a changed recipe trains on at most."""
    return recipe.batch_size if recipe.update == "gradient" else recipe.batch_size * recipe.local_steps


def _update(
    agreed: Agreement, model: GlobalModel, groups: Sequence[GroundTruth], recipe: Recipe, *, clean: bool
) -> Update:
    expected = step_of(model, groups, recipe)
    if clean:
        return expected
    return with_change(expected, model.parameters, _with_rest(agreed, model, expected, recipe))


def _with_rest(agreed: Agreement, model: GlobalModel, expected: Update, recipe: Recipe) -> Tensors:
    """The changed step with the factor and the rest that the recorded update has beyond its own."""
    change = sent_change(expected, model.parameters)
    unit = 1.0
    if recipe.update == "gradient" and agreed.recipe.update != "gradient":
        unit = -1.0 / agreed.recipe.learning_rate
    rest = agreed.residual()
    return {
        name: agreed.factor * tensor + unit * rest[name] if name in rest else tensor for name, tensor in change.items()
    }
