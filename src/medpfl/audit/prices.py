"""What the report's frontier is made of: defenses with what still leaks under them and what they cost."""

from __future__ import annotations

from dataclasses import dataclass

MEASURE = "auc"
"""What is lost decides which setting is cheapest: the area under the curve, which needs no threshold."""


@dataclass(frozen=True)
class Span:
    """A number with its interval; None where there is none."""

    value: float | None = None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Priced:
    """One defense at one strength.

    defense: its id. family: the kind of defense, empty for none. strength: the number that differs within its family.
    leakage: what the most successful attacker without oracle knowledge got, `attack` by name; one who knows a defense may
    also ignore that, so all count. knows: whether this attacker knew it. informed: whether any who knew it was run; true
    where there is nothing to know. lost: utility without minus with the defense. victims, failed: of that attacker's cell.
    dominated_by: a setting with no more leakage and no less utility. acceptable: whether the end of the interval holds
    the limit, None where that cannot be said. outdone: whether its most successful attacker is surely further from the
    truth than pictures that owe nothing to the update: then the attacks failed, and nothing is known about the defense.
    """

    defense: str
    family: str
    strength: float | None
    attack: str
    leakage: Span
    knows: bool
    informed: bool
    balanced_accuracy: Span
    auc: Span
    lost: Span
    victims: int
    failed: int
    epsilon: float | None = None
    bytes_sent: float | None = None
    acceptable: bool | None = None
    dominated_by: str | None = None
    outdone: bool = False

    @property
    def utility(self) -> float | None:
        """What is compared."""
        return self.auc.value


@dataclass(frozen=True)
class Frontier:
    """All defenses in one setting. `column` is the leakage that is compared, `recommended` the id of a defense.

    references: mean of `MEASURE` without defense, of clients alone and of guessing, as far as measured.
    """

    dataset: str
    model: str
    recipe: str
    channel: str
    adversary: str
    column: str
    limit: str | None
    settings: tuple[Priced, ...]
    recommended: str | None
    advice: str
    alone: Span = Span()
    guessing: float | None = None
    notes: tuple[str, ...] = ()

    def named(self, defense: str | None) -> Priced | None:
        """The setting of that defense."""
        return next((setting for setting in self.settings if setting.defense == defense), None)
