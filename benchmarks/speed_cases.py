"""What is timed: models, sizes, candidates and how long one repetition runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

Side = Literal["medpfl", "breaching", "training"]

TOTAL_VARIATION = 1e-4
LEARNING_RATE = 0.1


@dataclass(frozen=True)
class Case:
    """One row of the table.

    network: name in the zoo. size: of square RGB images. candidates: searched at once by MedPFL. victims: different
    targets among them. iterations: steps of one repetition by side. against: what the other side is. goal: the ratio
    that MedPFL is to reach: at least so many times faster than breaching, or at most so many times the cost of
    training. repetitions: pairs of timings.
    """

    name: str
    network: str
    size: int
    candidates: int
    victims: int
    against: Side
    goal: float
    iterations: int
    other_iterations: int
    repetitions: int

    def shortened(self) -> Case:
        """The same with fewer repetitions."""
        return replace(self, repetitions=max(3, self.repetitions // 3))


CASES = {
    case.name: case
    for case in (
        Case("lenet-64", "lenet_idlg", 32, 64, 64, "breaching", 20.0, 60, 200, 15),
        Case("resnet18-32-restarts", "resnet18_cifar", 32, 8, 1, "breaching", 3.0, 2, 8, 9),
        Case("resnet18-224", "resnet18", 224, 8, 1, "breaching", 2.0, 1, 3, 9),
        Case("floor-32", "resnet18_cifar", 32, 8, 8, "training", 4.0, 2, 4, 9),
        Case("floor-224", "resnet18", 224, 8, 8, "training", 3.5, 1, 2, 9),
    )
}
"""All rows, by name."""
