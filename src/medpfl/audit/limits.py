"""What a user calls acceptable: one comparison of a column of `cells.csv` with a number."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medpfl.core.errors import SpecError, suggestion

_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "<": operator.lt,
    ">": operator.gt,
}
LIMIT_COLUMNS = (
    "asr", "asr_low", "asr_high",
    *(f"{metric}_{part}" for metric in ("psnr", "ssim", "mse") for part in ("mean", "low", "high", "median")),
    "gain_psnr", "gain_ssim", "failed", "blocked", "done",
    "recovered", "recovered_low", "recovered_high", "epsilon", "reconstruction_bound", "observed_bound",
)  # fmt: skip
"""Columns of `cells.csv` that can be compared."""

MEANS = {metric: f"{metric}_mean" for metric in ("psnr", "ssim", "mse")}
"""Shorter names."""


WITH_INTERVAL = frozenset({"asr", "psnr", "ssim", "mse", "gain_psnr", "gain_ssim", "recovered"})
"""Numbers of a cell that have an interval over victims."""


@dataclass(frozen=True)
class Limit:
    """One comparison, for instance `asr <= 0.05`."""

    column: str
    comparison: str
    value: float

    def __str__(self) -> str:
        return f"{self.column} {self.comparison} {self.value:g}"

    def satisfied(self, cell: Mapping[str, Any]) -> bool | None:
        """Whether the cell's number satisfies the comparison; None if the cell has no such number."""
        return self._compared(cell.get(self.column))

    def surely(self, cell: Mapping[str, Any]) -> bool | None:
        """Whether the end of the number's interval that speaks against it satisfies it; None without an interval.

        A count and a median have no interval: these numbers are compared themselves.
        """
        low, high = self.ends
        return self._compared(cell.get(high if self.comparison.startswith("<") else low))

    @property
    def ends(self) -> tuple[str, str]:
        """The columns of the interval's ends; the column itself where it is no mean."""
        stem = self.column.removesuffix("_mean")
        if stem in WITH_INTERVAL:
            return f"{stem}_low", f"{stem}_high"
        return self.column, self.column

    def _compared(self, found: Any) -> bool | None:
        if found is None or found == "" or found != found:
            return None
        return _OPERATORS[self.comparison](float(found), self.value)


def parse_limit(text: str, where: str) -> Limit:
    """Reads a comparison such as `asr <= 0.05`. Raises SpecError.

    >>> str(parse_limit("asr<=0.05", "limit")), str(parse_limit("ssim < 0.5", "limit"))
    ('asr <= 0.05', 'ssim_mean < 0.5')
    """
    match = re.fullmatch(r"\s*(\w+)\s*(<=|>=|<|>)\s*([-+]?\d*\.?\d+(?:[eE][-+]?\d+)?)\s*", text)
    if match is None:
        raise SpecError(f"{where}: expected a comparison such as 'asr <= 0.05', found '{text}'")
    column, comparison, value = match.groups()
    column = MEANS.get(column, column)
    if column not in LIMIT_COLUMNS:
        raise SpecError(f"{where}: unknown column '{column}': {suggestion(column, (*LIMIT_COLUMNS, *MEANS))}")
    return Limit(column, comparison, float(value))


def any_satisfies(limit: Limit, cells: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the comparison is true of any cell (`--fail-if`)."""
    return any(limit.satisfied(cell) is True for cell in cells)


def all_satisfy(limit: Limit, cells: Sequence[Mapping[str, Any]]) -> bool | None:
    """Whether it is true of every finished cell (`limit`); None if no cell has the number."""
    found = [answer for cell in cells if (answer := limit.satisfied(cell)) is not None]
    return all(found) if found else None
