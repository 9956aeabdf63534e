"""What a matching attack is composed of: how it inverts, as one frozen value."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from medpfl.attacks.batch_statistics import StatisticsSource
from medpfl.attacks.matching.adam import NoiseSource
from medpfl.attacks.matching.initialization import Initialization
from medpfl.attacks.matching.layout import BatchedObjective, Layout
from medpfl.attacks.matching.lbfgs import Preconditioner
from medpfl.attacks.matching.objectives import DistanceName
from medpfl.attacks.matching.priors import Prior, no_prior
from medpfl.attacks.matching.problem import Precision
from medpfl.attacks.matching.states import Solver

Labels = Literal["soft", "inferred", "given"]


@dataclass(frozen=True)
class SearchSetup:
    """What a solver is built for: the layout of the variables, the number of evaluations between two snapshots, the
    curvature to start from where it is known, noise from the victims' own generators, and the victims' places among the
    observations."""

    layout: Layout
    block: int
    preconditioner: Preconditioner | None
    noise: NoiseSource
    places: tuple[int, ...] = ()


class Begun(NamedTuple):
    """What a stage searches with. term: added to the objective, None for nothing."""

    term: BatchedObjective | None
    solver: Solver


Stage = Callable[[Tensor | None, SearchSetup], Begun]
"""Where the victims (V, n) stand, None before the first stage, and what solvers are built for -> the stage's search."""


@dataclass(frozen=True)
class Group:
    """Restarts of a victim are coupled, see `GroupConsistency`."""

    weight: float
    every: int
    register: bool


@dataclass(frozen=True)
class Inversion:
    """How a matching attack inverts.

    labels: optimized jointly (`soft`), `inferred` from the update before, or `given` (an oracle); of a segmentation
    model these are its masks. start: the images' starting points. distance: `likelihood` is the negative log likelihood
    under a known defense's mechanism (`matching.likelihoods`). tensors: weights by patterns of names
    (`named_weights`). largest_tensors: how many tensors of the largest norms count. largest_entries: share of the entries
    with the largest values that count. goal: absolute objective, or share of the target's
    squared norm (`relative_goal`), at which a victim is solved. restarts: starts per victim; with `retry_above` a
    further one is made only if the ones before got stuck with more than this share of the target's squared norm left.
    scaled: search the distance divided by the target's squared norm, so that steps and ends do not depend on its size
    (what is reported is not divided). known_error: where an update shows its single image's output error, candidates are
    given that error in place of labels, `distance_with_error` takes the distance's place, and with `damping` the search
    is preconditioned by the Gauss-Newton matrix at a grey image, so damped, and starts are pulled towards grey until
    `contrast` of them is left. size_power: for distances by layer, a tensor counts as its number of entries to this
    power. prior: added for each candidate's images. gradient_weight: factor of the distance. statistics: where the
    expected statistics of batch norm layers come from; they count `statistics_weight` times, the first layer's
    `first_layer` times as much again. None leaves them out. group: couples the restarts, which then run side by side. assumed_noise: with it, a likelihood that is not in nats is taken for
    squared differences under noise of this share of the target's root mean square. stages: searches one after the other (`matching.stages`)
    in place of the single one with `solver`. layer_decay: weight of each
    layer's tensors as a share of the layer before. separate_epochs: every epoch of a simulated client has images of its
    own, which are paired and averaged in the end.
    """

    labels: Labels
    start: Initialization
    solver: Callable[[SearchSetup], Solver]
    distance: DistanceName | Literal["likelihood"]
    precision: Precision
    restarts: int
    retry_above: float | None = None
    goal: float = 0.0
    relative_goal: float = 0.0
    scaled: bool = False
    largest_tensors: int | None = None
    size_power: float = 0.0
    tensors: Mapping[str, float] | None = None
    largest_entries: float | None = None
    prior: Prior = no_prior
    gradient_weight: float = 1.0
    statistics: StatisticsSource | None = None
    statistics_weight: float = 0.0
    first_layer: float = 1.0
    group: Group | None = None
    known_error: bool = False
    distance_with_error: DistanceName | None = None
    damping: float | None = None
    contrast: float = 1.0
    layer_decay: float = 1.0
    separate_epochs: bool = False
    stages: tuple[Stage, ...] = ()
    assumed_noise: float | None = None

    @property
    def distance_only(self) -> bool:
        """Whether the objective is the distance of gradients and nothing else."""
        return self.prior is no_prior and self.statistics is None and self.group is None and not self.stages
