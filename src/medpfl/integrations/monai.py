"""MONAI's client filters: vetting of the weights that come, a defense and the leakage gate on those that leave.

`monai.fl` hands an `ExchangeObject` through filters, `pre_filters` before training and `post_weight_filters` before
sending. The filters of one client share a `Memory`. Where one of them cannot look or finds something it raises
`Withheld`, and nothing is trained or sent; MONAI's interface knows no other answer. Imports `monai` (extra
`medpfl[monai]`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np
from torch import Tensor

from medpfl.core.domain import Batch, ClientState, GlobalModel, Recipe, Tensors
from medpfl.core.errors import DataError, InputError, MedPFLError, MissingExtra
from medpfl.defenses import Defense
from medpfl.federation.guarding import Guarding, Verdict
from medpfl.federation.recipes import check_recipe
from medpfl.federation.recording.arrays import as_tensor
from medpfl.guards import VettingGuard
from medpfl.guards.participation import WithholdLimit
from medpfl.integrations.common.audit_log import AuditLog
from medpfl.integrations.common.deciding import Decisions, closed, received, searching_gate, trained
from medpfl.integrations.common.defending import check_outside_training, defended

if find_spec("monai") is None:
    raise MissingExtra("the MONAI filters need MONAI: pip install 'medpfl[monai]'")

from monai.fl.utils.constants import WeightType
from monai.fl.utils.exchange_object import ExchangeObject
from monai.fl.utils.filters import Filter

LONGEST_TEXT = 1000
"""Characters of a word that may leave beside an update."""


class Withheld(MedPFLError):
    """Nothing is trained on, or nothing is sent. The reason stands in the site's own log."""


@dataclass
class Memory:
    """What the filters of one client remember: the weights that came, what a defense carries, which rounds ended."""

    received: Tensors | None = None
    state: ClientState = field(default_factory=ClientState)
    withheld: list[bool] = field(default_factory=list)

    def read(self) -> list[bool]:
        """Which rounds were withheld, oldest first."""
        return list(self.withheld)

    def write(self, withheld: list[bool]) -> None:
        """Remembers this instead."""
        self.withheld = list(withheld)

    def base(self) -> Tensors:
        """The weights that came. Raises DataError where no filter saw them."""
        if self.received is None:
            raise DataError("no received weights are known: put ReceivedFilter or VettingFilter among the pre_filters")
        return self.received


class ReceivedFilter(Filter):
    """A pre-filter that only remembers the weights that come, for a defense or a gate where no vetting is wanted."""

    def __init__(self, memory: Memory) -> None:
        self.memory = memory

    def __call__(self, data: ExchangeObject, extra: dict[str, Any] | None = None) -> ExchangeObject:
        """The same. Raises DataError for what holds no weights."""
        self.memory.received = None
        self.memory.received = tensors_of(data)
        return data


class VettingFilter(Filter):
    """A pre-filter that looks at the weights before anything is trained on them, as `medpfl vet` does.

    model: the architecture that was agreed on, whose tensors are never used. images: some of the client's own; drawn
    ones are taken where None. After `limit` withheld rounds every further one is.
    """

    def __init__(
        self,
        model: GlobalModel,
        memory: Memory,
        images: Batch | None = None,
        guard: Guarding | None = None,
        limit: WithholdLimit | None = None,
        log: AuditLog | None = None,
    ) -> None:
        self.model, self.memory, self.images = model, memory, images
        self.guard = VettingGuard() if guard is None else guard
        self.decisions = Decisions(log or AuditLog(), limit or WithholdLimit(), memory)

    def __call__(self, data: ExchangeObject, extra: dict[str, Any] | None = None) -> ExchangeObject:
        """The same, if the guard lets it pass; raises Withheld otherwise."""
        self.memory.received = None
        if self.decisions.stays_away("vetting") or self.decisions.ends(closed("vetting", lambda: self._verdict(data))):
            raise Withheld("withheld")
        self.memory.received = tensors_of(data)
        return data

    def _verdict(self, data: ExchangeObject) -> Verdict | None:
        recipe = Recipe(update="weights")
        return self.guard.before(received(self.model, tensors_of(data), self.images, recipe))


class DefenseFilter(Filter):
    """A post-weight-filter that applies a defense of updates to weights or to changes of weights.

    Trainable tensors, batch-norm buffers and counters are kept apart: with `model` as it says, else by names and types.
    Randomness is fresh in every round unless a seed is given, for tests. Raises SpecError for defenses that work inside
    training, and Withheld where the defense breaks down.
    """

    def __init__(
        self,
        defense: Defense,
        memory: Memory,
        model: GlobalModel | None = None,
        seed: int | None = None,
        log: AuditLog | None = None,
    ) -> None:
        check_outside_training(defense, "a filter")
        self.defense, self.memory, self.model, self.seed = defense, memory, model, seed
        self.log = log or AuditLog()

    def __call__(self, data: ExchangeObject, extra: dict[str, Any] | None = None) -> ExchangeObject:
        """Another object with the defended weights, and the numbers beside them as they were."""
        try:
            answer = self._defended(data)
        except MedPFLError as error:
            reason = str(error)
        except Exception as error:  # noqa: BLE001  an update that could not be defended is not sent
            reason = f"{type(error).__name__}: {error}"
        else:
            self.log.decided("defense", "passed", (type(self.defense).__name__,))
            return answer
        self.log.decided("defense", "withheld", (reason,))
        raise Withheld("withheld")

    def _defended(self, data: ExchangeObject) -> ExchangeObject:
        found, sent = tensors_of(data), self.memory.base()
        result, self.memory.state = defended(
            self.defense,
            sent,
            found,
            self.memory.state,
            model=self.model,
            kind="delta" if _changes(data) else "weights",
            seed=self.seed,
        )
        return _answer(data, result)


class GateFilter(Filter):
    """A post-weight-filter that reads the client's own update as an attacker would, and withholds it if images come back.

    images: the images that were trained on, in order: the client owns the truth, which no server has. recipe: how the
    client trains; it must be what it really does, or the gate compares with the wrong step. Put it last.
    """

    def __init__(
        self,
        model: GlobalModel,
        images: Batch,
        recipe: Recipe,
        memory: Memory,
        guard: Guarding | None = None,
        limit: WithholdLimit | None = None,
        log: AuditLog | None = None,
    ) -> None:
        if problems := check_recipe(recipe, model):
            raise InputError(f"recipe: {problems[0]}")
        self.model, self.images, self.recipe, self.memory = model, images, recipe, memory
        self.guard = searching_gate() if guard is None else guard
        self.decisions = Decisions(log or AuditLog(), limit or WithholdLimit(), memory)

    def __call__(self, data: ExchangeObject, extra: dict[str, Any] | None = None) -> ExchangeObject:
        """The weights and the numbers beside them, if the gate lets them pass; raises Withheld otherwise."""
        away = self.decisions.stays_away("leakage_gate")
        if away or self.decisions.ends(closed("leakage_gate", lambda: self._verdict(data))):
            raise Withheld("withheld")
        return _answer(data, tensors_of(data))

    def _verdict(self, data: ExchangeObject) -> Verdict | None:
        found, sent = tensors_of(data), self.memory.base()
        _check_beside(data)
        if unknown := [name for name in found if name not in sent]:
            raise DataError(f"the update holds '{unknown[0]}', which was not received")
        new = {name: sent[name] + tensor for name, tensor in found.items()} if _changes(data) else found
        return self.guard.after(trained(received(self.model, sent, self.images, self.recipe), new, None))


def tensors_of(data: ExchangeObject) -> dict[str, Tensor]:
    """Copies of the weights by name, in their own types. Raises DataError where there are none that can be read."""
    weights = getattr(data, "weights", None)
    if not isinstance(weights, Mapping) or not weights:
        raise DataError("the exchange object holds no weights")
    return {str(name): as_tensor(str(name), value) for name, value in weights.items()}


def _changes(data: ExchangeObject) -> bool:
    """Whether the weights are changes. Raises DataError where it is not said what they are."""
    if data.weight_type not in (WeightType.WEIGHTS, WeightType.WEIGHT_DIFF):
        raise DataError(f"weight_type is {data.weight_type!r}: expected weights or changes of weights")
    return bool(data.weight_type == WeightType.WEIGHT_DIFF)


def _check_beside(data: ExchangeObject) -> None:
    """Raises DataError for anything beside the weights that could carry images: only numbers and short words pass."""
    if data.optim is not None:
        raise DataError("the optimizer's state would leave with the weights")
    for what, values in (("statistics", data.statistics), ("metrics", data.metrics), ("object", dict(data))):
        for name, value in (values or {}).items():
            if not (value is None or isinstance(value, bool | int | float | np.number | str)):
                raise DataError(f"the {what} hold '{name}', a {type(value).__name__}: only numbers and words may leave")
            if len(str(value)) > LONGEST_TEXT:
                raise DataError(f"the {what} hold '{name}' with {len(str(value))} characters")


def _answer(data: ExchangeObject, tensors: Tensors) -> ExchangeObject:
    """What leaves: these tensors as the weights were held, and the plain numbers beside them."""
    _check_beside(data)
    weights = {
        name: tensors[str(name)].to(value.device) if isinstance(value, Tensor) else tensors[str(name)].numpy()
        for name, value in data.weights.items()
    }
    return ExchangeObject(
        weights=weights, metrics=data.metrics, weight_type=data.weight_type, statistics=data.statistics
    )
