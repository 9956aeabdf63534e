"""Everything that can be measured of an update without any ground truth."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from medpfl.audit.replay.diagnosis import training, values
from medpfl.audit.replay.diagnosis.noise import noise
from medpfl.audit.replay.diagnosis.subject import Fact, Subject
from medpfl.core.functional import is_finite

MEASURES: Sequence[Callable[[Subject], Iterator[Fact]]] = (
    training.examples,
    training.recipe,
    training.batch_norm,
    training.labels,
    noise,
    values.size,
    values.bound,
    values.zeros,
    values.precision,
    values.grid,
    values.equal_steps,
    training.rank,
    training.learnt,
)
"""What is measured, in the order in which it is told."""


def measured(subject: Subject) -> list[Fact]:
    """All facts about one update, from what the server sees. Of an update that is not finite, only its size and images."""
    finite = all(is_finite(tensor) for tensor in subject.change.values())
    measures = MEASURES if finite else (training.examples, training.recipe, values.size)
    if finite and subject.size == 0:
        measures = (training.examples, training.recipe, values.zeros)
    return [fact for measure in measures for fact in measure(subject)]
