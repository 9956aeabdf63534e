"""The filter under audit: loaded by name, made anew as often as needed, called on copies."""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from medpfl.core.domain import Tensors
from medpfl.core.errors import ModelError, suggestion
from medpfl.models.factories import imported, searched_first
from medpfl.models.probe import summary_of

Filter = Callable[[Any], Any]
"""An update as a mapping of names to tensors or arrays -> what is sent in its place."""


@dataclass(frozen=True)
class Subject:
    """A filter that can be made anew. `settings` are what it is made with, `numbers` those that are numbers.

    arrays: what it is called with. search_path: where its own imports are looked for first.
    """

    name: str
    build: Callable[..., Filter]
    settings: Mapping[str, Any] = field(default_factory=dict)
    numbers: Mapping[str, float] = field(default_factory=dict)
    arrays: Literal["torch", "numpy"] = "torch"
    search_path: tuple[Path, ...] = ()

    def made(self, **changes: Any) -> Filter:
        """A new filter, with some settings changed. Raises whatever the filter's own code raises."""
        with searched_first(self.search_path):
            found = self.build(**{**self.settings, **changes})
        if not callable(found):
            raise TypeError(f"made {type(found).__name__}, which cannot be called with an update")
        return found


@dataclass(frozen=True)
class Call:
    """What came of one call: what is sent, or the error that the filter raised. in_place: its input was changed."""

    sent: Tensors = field(default_factory=dict)
    error: str = ""
    in_place: bool = False


def load_filter(name: str, settings: Mapping[str, Any] | None = None, search_path: Sequence[Path] = ()) -> Subject:
    """The filter that `package.module:name` names, made with `settings`.

    A class is made with the settings and its objects are called. A function that needs one argument is the filter
    itself, its other arguments are settings. A function that needs none is a factory: it is called with the settings
    and gives the filter. Any other object is the filter as it is. Raises ModelError.
    """
    given = dict(settings or {})
    with searched_first(search_path):
        found = imported(name, search_path)
    subject = replace(_subject(name, found, given), search_path=tuple(search_path))
    try:
        subject.made()
    except (Exception, SystemExit) as error:  # a user's filter may raise anything
        raise ModelError(f"filter '{name}' cannot be made: {summary_of(error)}") from error
    return subject


def _subject(name: str, found: Callable[..., Any], given: dict[str, Any]) -> Subject:
    made_by_call = inspect.isclass(found)
    if not made_by_call and not inspect.isroutine(found):
        if given:
            raise ModelError(
                f"filter '{name}' is an object, which takes no settings: name its class, or leave them out"
            )
        return Subject(name, lambda: copy.deepcopy(found))
    try:
        parameters = list(inspect.signature(found).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    kinds = inspect.Parameter
    open_ended = any(one.kind == kinds.VAR_KEYWORD for one in parameters)
    named = [one for one in parameters if one.kind not in (kinds.VAR_POSITIONAL, kinds.VAR_KEYWORD)]
    needed = [one for one in named if one.default is kinds.empty and one.name not in given]
    known = {one.name for one in named}
    if unknown := [key for key in given if key not in known and not open_ended]:
        raise ModelError(f"filter '{name}' has no setting '{unknown[0]}': {suggestion(unknown[0], known)}")
    values = {one.name: given.get(one.name, one.default) for one in named if one not in needed}
    numbers = {key: value for key, value in values.items()
               if isinstance(value, int | float) and not isinstance(value, bool)}  # fmt: skip
    if made_by_call or not needed:
        if needed:
            raise ModelError(f"filter '{name}' needs '{needed[0].name}': give it with --set {needed[0].name}=VALUE")
        return Subject(name, found, given, numbers)
    if len(needed) > 1:
        raise ModelError(
            f"filter '{name}' needs {', '.join(repr(one.name) for one in needed)}: a filter takes one update; give the "
            "others with --set NAME=VALUE"
        )
    return Subject(name, _partial(found, needed[0]), given, numbers)


def _partial(found: Callable[..., Any], update: inspect.Parameter) -> Callable[..., Filter]:
    """Makes the filter of a function: its settings bound, its update left open."""
    positional = update.kind != inspect.Parameter.KEYWORD_ONLY

    def build(**settings: Any) -> Filter:
        def bound(tensors: Any) -> Any:
            return found(tensors, **settings) if positional else found(**{update.name: tensors}, **settings)

        return bound

    return build


def call(made: Filter, tensors: Tensors, *, arrays: str = "torch", seed: int | None = None) -> Call:
    """Calls a filter on a copy. seed: of the global generators of PyTorch, NumPy and Python, None to let them run on.

    The global generators are put back afterwards only where a seed is given. Exceptions become the call's `error`.
    """
    given = {name: _given(tensor, arrays) for name, tensor in tensors.items()}
    try:
        with _seeded(seed):
            returned = made(given)
        in_place = any(not _equal(_tensor(given[name]), tensor) for name, tensor in tensors.items() if name in given)
        if returned is None and in_place:
            returned = given
        if not isinstance(returned, Mapping):
            kind = "nothing" if returned is None else type(returned).__name__
            return Call(error=f"returned {kind} instead of a mapping of names to tensors", in_place=in_place)
        return Call({str(name): _tensor(value) for name, value in returned.items()}, in_place=in_place)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - a user's filter may raise anything, which is a finding
        return Call(error=summary_of(error))


def _given(tensor: Tensor, arrays: str) -> Any:
    if arrays == "torch":
        return tensor.clone()
    if tensor.dtype == torch.bfloat16:
        raise ModelError("NumPy has no bfloat16")  # the callers leave these out
    return tensor.clone().numpy()


def _tensor(value: Any) -> Tensor:
    return value.detach().clone() if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value)).clone()


def _equal(first: Tensor, second: Tensor) -> bool:
    return first.shape == second.shape and bool(torch.equal(first.double(), second.double()))


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    if seed is None:
        yield
        return
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002 - a filter may draw from it
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002
            random.setstate(python_state)
