"""The entries of a spec's axes: what the user gave, as frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass as config_dataclass

from medpfl.attacks.base import Attack
from medpfl.core.config import STRICT
from medpfl.core.domain import Recipe
from medpfl.core.functional import SSIM_WINDOW
from medpfl.data import Reader
from medpfl.defenses import Defense
from medpfl.federation.channels import Channel
from medpfl.federation.training import TrainingConfig
from medpfl.guards import Guard
from medpfl.models import Normalization

AXES = ("dataset", "model", "recipe", "threat_model", "channel", "defense", "guard", "attack")
"""Axis names as in the columns of the result tables."""

SPEC_KEYS = {
    "dataset": "data",
    "model": "models",
    "recipe": "recipes",
    "threat_model": "threat_models",
    "channel": "channels",
    "defense": "defenses",
    "guard": "guards",
    "attack": "attacks",
}
"""Axis name -> key in the spec."""


MARK = "~"
"""Stands in the ids of entries that were changed for a diagnosis and nowhere else: no id in a spec can have it."""


@dataclass(frozen=True)
class Entry:
    """One value of one axis. `params` are its settings as plain values; equal params mean equal results."""

    axis: str
    name: str
    id: str
    only: Mapping[str, tuple[str, ...]]
    params: Mapping[str, Any]

    @property
    def stream(self) -> str:
        """What random streams are keyed by: an entry that was changed for a diagnosis draws what it drew before."""
        return self.id.partition(MARK)[0]


@config_dataclass(frozen=True, kw_only=True, config=STRICT)
class DataSettings:
    """How images enter the audit, whatever the reader."""

    size: Annotated[
        int | tuple[int, ...],
        Field(description="height and width, or depth, height and width of volumes (or one number for all), pixels"),
    ] = 32
    channels: Annotated[Literal[1, 3], Field(description="1 (grey) or 3 (RGB)")] = 1
    aspect: Annotated[
        Literal["squash", "crop", "pad"], Field(description="how other aspects become the given size")
    ] = "squash"
    victims: Annotated[int, Field(ge=0, description="clients that are attacked")] = 8
    maximum: Annotated[int | None, Field(ge=1, description="read at most so many images")] = None
    near_duplicates: Annotated[
        float, Field(gt=0, le=1, description="thumbnail correlation above which a pool image is left out")
    ] = 0.95

    def __post_init__(self) -> None:
        sides = (self.size,) if isinstance(self.size, int) else self.size
        if not sides or min(sides) < SSIM_WINDOW:
            raise ValueError(
                f"size {self.size}: expected at least {SSIM_WINDOW} pixels along every axis, "
                "because SSIM cannot be measured on smaller images"
            )


@dataclass(frozen=True)
class DataEntry(Entry):
    """Images: a reader and how its images are brought to one size."""

    reader: Reader
    settings: DataSettings


@dataclass(frozen=True)
class ModelEntry(Entry):
    """A model and the state in which it is attacked."""

    source: str
    state: Literal["untrained", "untrained_per_victim", "imagenet", "trained", "checkpoint"]
    training: TrainingConfig | None
    checkpoint: Path | None
    normalize: Normalization | None
    classes: int | None
    segments: bool
    """Whether it is trained with masks."""


@dataclass(frozen=True)
class RecipeEntry(Entry):
    """How clients train."""

    recipe: Recipe


@dataclass(frozen=True)
class ThreatModelEntry(Entry):
    """Who listens, what it may change, what it knows beyond what every adversary knows."""

    can: frozenset[str]
    knows: frozenset[str]
    withhold: frozenset[str]
    auxiliary: str | None


@dataclass(frozen=True)
class ChannelEntry(Entry):
    """What lies between clients and server."""

    channel: Channel


@dataclass(frozen=True)
class DefenseEntry(Entry):
    """What the client changes."""

    defense: Defense


@dataclass(frozen=True)
class GuardEntry(Entry):
    """A client's check that can stop a round."""

    guard: Guard


@dataclass(frozen=True)
class AttackEntry(Entry):
    """What the adversary does with its observation."""

    attack: Attack
