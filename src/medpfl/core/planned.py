"""Names that a spec may hold in other versions of MedPFL, so that nobody takes them for misspelled."""

from __future__ import annotations

from collections.abc import Mapping

PLANNED: Mapping[str, tuple[str, ...]] = {
    "attack": ("robbing_the_fed", "curious_abandon_honesty"),
}
"""Kind, as its registry calls it -> names that this version lacks. Whoever registers one takes it out here."""


def not_in_this_version(kind: str, name: str) -> bool:
    """Whether the name is known and not there yet.

    >>> not_in_this_version("attack", "robbing_the_fed"), not_in_this_version("attack", "robin_the_fed")
    (True, False)
    """
    return name in PLANNED.get(kind, ())
