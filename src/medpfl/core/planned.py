"""Names that a spec may hold in other versions of MedPFL, so that nobody takes them for misspelled."""

from __future__ import annotations

from collections.abc import Mapping

PLANNED: Mapping[str, tuple[str, ...]] = {
    "attack": ("medleak", "robbing_the_fed", "curious_abandon_honesty"),
    "channel": ("secure_sum", "secagg_plus"),
}
"""Kind, as its registry calls it -> names that this version lacks. Whoever registers one takes it out here."""


def not_in_this_version(kind: str, name: str) -> bool:
    """Whether the name is known and not there yet.

    >>> not_in_this_version("channel", "secure_sum"), not_in_this_version("channel", "sekure_sum")
    (True, False)
    """
    return name in PLANNED.get(kind, ())
