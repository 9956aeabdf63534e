"""From a recorded update to what a diagnosis looks at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TypeVar

from medpfl.audit.replay.diagnosis.agreement import EXPLAINED, Agreement, agreement, best_agreement
from medpfl.audit.replay.diagnosis.changes import Owned
from medpfl.audit.replay.diagnosis.noise import class_sums
from medpfl.audit.replay.diagnosis.subject import Subject
from medpfl.audit.replay.observing import observe
from medpfl.audit.replay.settings import Replay
from medpfl.core.domain import Recipe
from medpfl.core.errors import DataError, InputError, ModelError
from medpfl.core.functional import is_finite
from medpfl.federation.changes import norm, sent_change
from medpfl.federation.recording import Recorded
from medpfl.metrics.truth import GroundTruth
from medpfl.models.state import matched_state


def subject_of(settings: Replay, update: Recorded, norms: Mapping[str, float] | None = None) -> Subject:
    """An update with all that the server knows of it. norms: `round_norms`, where they are known.

    Raises DataError or ModelError where it cannot be read.
    """
    observation = observe(settings.recording, update, settings.model, settings.known_recipe, examples=settings.examples)
    answered = matched_state(settings.model, update.tensors, f"the update of round {update.round}")
    raw = {name: answered[name] for name in observation.update.trainable}
    return Subject(
        observation=observation,
        raw=raw,
        norms=round_norms(settings, update) if norms is None else norms,
        fresh=settings.model,
        said=update.config,
        stated=update.examples is not None,
    )


def round_norms(settings: Replay, update: Recorded) -> Mapping[str, float]:
    """How much each client of the round changed the model, as far as their updates can be read."""
    found = {}
    for other in settings.recording.updates:
        if other.round != update.round or other.kind != update.kind:
            continue
        try:
            seen = observe(settings.recording, other, settings.model, None, examples=settings.examples or 1)
        except InputError:
            continue
        found[other.client] = norm(sent_change(seen.update, seen.model.parameters))
    return found


def owned_update(
    settings: Replay, update: Recorded, subject: Subject, recipe: tuple[Recipe, bool] | None = None
) -> Owned | str:
    """The update with its truth and the client's step replayed, or why there is nothing to compare.

    recipe: the client's own and whether it is another than the stated one, where that was found out before.
    """
    truth = None if settings.truths is None else settings.truths.of(update)
    if truth is None:
        return "the truth of this client was not given"
    if not all(is_finite(tensor) for tensor in subject.change.values()):
        return "the update is not finite"
    if (reason := _why_no_step(truth, subject)) is not None:
        return reason
    groups = _groups(truth, update, subject)
    if isinstance(groups, str):
        return groups
    stated, kind = subject.observation.recipe, subject.observation.update.kind
    if recipe is not None:
        return Owned(subject, groups, agreement(subject.model, subject.change, groups, recipe[0], found=recipe[1]))
    sums = class_sums(subject)
    covered = not isinstance(sums, str) and sums.part(subject) > 2 * EXPLAINED
    found = best_agreement(subject.model, subject.change, groups, stated, kind, noisy=covered)
    return Owned(subject, groups, found)


def _why_no_step(truth: GroundTruth, subject: Subject) -> str | None:
    """Why a client cannot train on this truth; None if it can."""
    task, labels = subject.model.task, truth.labels
    if task.name == "segmentation":
        return "the model is trained with masks, which a folder of truth does not hold"
    shapes = [(task.classes,)] if task.name == "multi_label" else [(), (task.classes,)]
    if tuple(labels.shape[1:]) not in shapes:
        return f"the truth's labels have shape {tuple(labels.shape)}, which a {task.name} model does not take"
    if labels.ndim == 1 and not 0 <= int(labels.min()) <= int(labels.max()) < task.classes:
        return f"the truth's labels run from {int(labels.min())} to {int(labels.max())}, the model has {task.classes} classes"
    return None


def _groups(truth: GroundTruth, update: Recorded, subject: Subject) -> tuple[GroundTruth, ...] | str:
    """The images of each client, the order of an aggregate's being that of its `examples_by_client`."""
    if subject.observation.clients == 1:
        return (truth,)
    counts = update.config.get("examples_by_client")
    if not isinstance(counts, list) or sum(counts) != len(truth.images) or min(counts) < 1:
        return "which image of the aggregate is whose is not known (examples_by_client)"
    starts = [sum(counts[:place]) for place in range(len(counts))]
    return tuple(truth.part(range(start, start + count)) for start, count in zip(starts, counts, strict=True))


MOST_KEPT = 8
"""Updates whose tensors are held at the same time."""

ENTRIES_KEPT = 40_000_000
"""And so many trainable entries of them, but at least one update."""

Key = tuple[str, int, str]
T = TypeVar("T")


class Known:
    """Subjects and truths of the updates of a replay, the last ones kept: they are asked for by round."""

    def __init__(self) -> None:
        self._subjects: dict[Key, Subject | str] = {}
        self._owned: dict[Key, Owned | str] = {}
        self._norms: dict[Key, Mapping[str, float]] = {}
        self._recipes: dict[Key, tuple[Recipe, bool]] = {}

    def subject(self, settings: Replay, update: Recorded) -> Subject | str:
        """What is known of an update, or why it cannot be read."""

        def read() -> Subject | str:
            try:
                key = (settings.name, update.round, update.kind or "")
                return subject_of(settings, update, _kept(self._norms, key, lambda: round_norms(settings, update)))
            except (DataError, ModelError) as error:
                return str(error)

        most = max(1, ENTRIES_KEPT // settings.model.parameter_count)
        return _kept(self._subjects, (settings.name, update.round, update.client), read, most)

    def owned(self, settings: Replay, update: Recorded) -> Owned | str:
        """The update with its truth, or why there is none."""

        key = (settings.name, update.round, update.client)

        def read() -> Owned | str:
            subject = self.subject(settings, update)
            if isinstance(subject, str):
                return subject
            found = owned_update(settings, update, subject, self._recipes.get(key))
            if isinstance(found, Owned) and isinstance(found.agreement, Agreement):
                self._recipes[key] = found.agreement.recipe, found.agreement.found
            return found

        return _kept(self._owned, key, read, max(1, ENTRIES_KEPT // settings.model.parameter_count))


def _kept(held: dict[Key, T], key: Key, make: Callable[[], T], most: int = MOST_KEPT) -> T:
    if key not in held:
        while len(held) >= min(most, MOST_KEPT):
            held.pop(next(iter(held)))
        held[key] = make()
    return held[key]
