"""What a replay's diagnosis says of each recorded update, and the same grouped over all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from medpfl.report.formatting import DASH, count
from medpfl.report.loading import number

TITLES: Mapping[str, str] = {
    "why": "Why",
    "search": "How far the search got",
    "images": "Images",
    "recipe": "Recipe",
    "batch_norm": "Batch norm",
    "batches": "Batches by counters",
    "labels": "Labels",
    "noise": "Noise",
    "size": "Size",
    "bound": "Clipping",
    "zeros": "Zeros",
    "precision": "Precision",
    "grid": "Quantization",
    "equal_steps": "Signs",
    "rank": "Directions",
    "loss": "Loss",
    "learnt": "What was left to learn",
    "unread": "Not read",
    "true_images": "Images (truth)",
    "recipe_found": "Recipe (truth)",
    "agreement": "Client's step (truth)",
    "residual": "What is left (truth)",
    "dropped": "What is missing (truth)",
    "true_labels": "Labels (truth)",
    "true_loss": "Loss (truth)",
}
"""Measurements in words, in the order in which they are told."""

STANDINGS = {"hinders": "stands in the way", "helps": "opens the way", "neutral": ""}


@dataclass(frozen=True)
class Fact:
    """One sentence about one update, or about one attack on it."""

    name: str
    text: str
    value: float | None
    standing: str
    attack: str

    @property
    def title(self) -> str:
        """What was measured."""
        name = self.name.partition(":")[0]
        title = TITLES.get(name, name)
        return f"{self.attack}: {title[:1].lower()}{title[1:]}" if self.attack else title

    @property
    def stands(self) -> str:
        """What it means for attacks, empty of what is about one of them."""
        return "" if self.attack else STANDINGS.get(self.standing, "")


@dataclass(frozen=True)
class RecordedUpdate:
    """One update with all that was measured of it."""

    recording: str
    round: int
    client: str
    facts: tuple[Fact, ...]

    @property
    def name(self) -> str:
        """Recording, round and client."""
        return f"{self.recording}, round {self.round}, client {self.client}"


@dataclass(frozen=True)
class Group:
    """What several updates of one recording have in common. example: the first of them with its sentence."""

    recording: str
    fact: Fact
    updates: int
    of: int
    lowest: float | None
    highest: float | None
    example: RecordedUpdate

    @property
    def spread(self) -> str:
        """Smallest to largest number."""
        if self.lowest is None or self.highest is None:
            return DASH
        ends = f"{self.lowest:.3g}", f"{self.highest:.3g}"
        return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1]}"

    @property
    def counted(self) -> str:
        """How many updates.

        >>> fact = Fact("noise", "text", 0.1, "hinders", "")
        >>> Group("run", fact, 2, 3, 0.1, 0.2, RecordedUpdate("run", 1, "a", (fact,))).counted
        '2 of 3 updates'
        """
        return f"{self.updates} of {count(self.of, 'update')}"


def recorded_updates(entries: Iterable[Mapping[str, Any]]) -> tuple[RecordedUpdate, ...]:
    """The entries `updates` of `summary.json`."""
    return tuple(
        RecordedUpdate(
            recording=str(entry.get("recording", "")),
            round=int(number(entry.get("round")) or 0),
            client=str(entry.get("client", "")),
            facts=tuple(_fact(part) for part in entry.get("facts") or ()),
        )
        for entry in entries
    )


def owned(updates: Iterable[RecordedUpdate]) -> bool:
    """Whether anything rests on the true images."""
    return any(fact.title.endswith("(truth)") for update in updates for fact in update.facts)


def _fact(part: Mapping[str, Any]) -> Fact:
    return Fact(
        name=str(part.get("name", "")),
        text=str(part.get("text", "")),
        value=number(part.get("value")),
        standing=str(part.get("standing", "")),
        attack=str(part.get("attack") or ""),
    )


def groups(updates: Sequence[RecordedUpdate]) -> tuple[Group, ...]:
    """What is worth telling first: what stands in the way, and what attacks reached, by recording."""
    members: dict[tuple[str, str, str, str], list[tuple[RecordedUpdate, Fact]]] = {}
    totals: dict[str, int] = {}
    for update in updates:
        totals[update.recording] = totals.get(update.recording, 0) + 1
        for fact in update.facts:
            if fact.attack or fact.standing == "hinders" or fact.name == "agreement":
                key = (update.recording, fact.attack, fact.name, fact.standing)
                members.setdefault(key, []).append((update, fact))
    order = list(TITLES)

    def place(key: tuple[str, str, str, str]) -> tuple[int, int, str, int]:
        recording, attack, name, _ = key
        kind = name.partition(":")[0]
        return (
            list(totals).index(recording),
            int(not attack),
            attack,
            order.index(kind) if kind in order else len(order),
        )

    found = []
    for key in sorted(members, key=place):
        same = members[key]
        values = [fact.value for _, fact in same if fact.value is not None]
        found.append(
            Group(
                recording=key[0],
                fact=same[0][1],
                updates=len({update.name for update, _ in same}),
                of=totals[key[0]],
                lowest=min(values, default=None),
                highest=max(values, default=None),
                example=same[0][0],
            )
        )
    return tuple(found)
