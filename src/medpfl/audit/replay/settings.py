"""What is replayed: a recording, the model that it belongs to, the attacks, and what is known of the clients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from medpfl.audit.entries import AttackEntry, DefenseEntry, RecipeEntry
from medpfl.audit.entry_parsing import attack_entry, defense_entry, recipe_entry
from medpfl.audit.replay.choosing import chosen_updates
from medpfl.audit.replay.observing import observed_kind
from medpfl.audit.replay.truth import Truths
from medpfl.core.domain import Auxiliary, GlobalModel, Recipe
from medpfl.core.errors import DataError, ModelError, SpecError
from medpfl.core.seeding import content_hash
from medpfl.data import FolderReader, load_dataset
from medpfl.federation.recording import Recorded, Recording
from medpfl.guards.vetting import build_agreed
from medpfl.models.state import matched_state

DEFAULT_ATTACKS: tuple[Mapping[str, Any], ...] = (
    {"name": "first_layer_readout"},
    {"name": "feature_readout"},
    {"name": "idlg", "iterations": 60},
    {"name": "gradinv", "iterations": 300},
)
"""What a replay runs unless the user names attacks; those that cannot run on the model are refused with the reason."""

LOOKED_AT = 8
"""Updates of which one must fit the model, or the recording is of another one."""


@dataclass(frozen=True)
class Replay:
    """Everything that the replay of one recording depends on.

    name: of the recording. updates: those that are attacked, in order. recipe: how clients trained; None if unknown.
    defense: what attackers know that clients do to their updates; None if they are told nothing.
    pool: images of the adversary's own; the first half is auxiliary knowledge, the second half gives the null
    baselines. examples: number of images of an update that does not say.
    """

    name: str
    recording: Recording
    updates: tuple[Recorded, ...]
    model: GlobalModel
    attacks: tuple[AttackEntry, ...]
    recipe: RecipeEntry | None
    defense: DefenseEntry | None
    truths: Truths | None
    auxiliary: Auxiliary | None
    nulls: Auxiliary | None
    examples: int | None
    threshold: float
    seed: int

    @property
    def known_recipe(self) -> Recipe | None:
        """The recipe as attacks take it."""
        return None if self.recipe is None else self.recipe.recipe

    @property
    def fingerprint(self) -> str:
        """Hash of what results depend on, the updates and the truth by content."""
        return content_hash(
            {
                "name": self.name,
                "updates": [[one.round, one.client, one.sha256] for one in self.updates],
                "model": [self.model.name, list(self.model.image_shape), self.model.task.name, self.model.task.classes],
                "attacks": [[entry.id, entry.name, dict(entry.params)] for entry in self.attacks],
                "recipe": None if self.recipe is None else dict(self.recipe.params),
                "defense": None if self.defense is None else [self.defense.name, dict(self.defense.params)],
                "truth": None if self.truths is None else self.truths.fingerprint,
                "pool": None
                if self.nulls is None
                else [len(self.nulls.images), float(self.nulls.images.double().sum())],
                "examples": self.examples,
                "threshold": self.threshold,
                "seed": self.seed,
            }
        )


def prepare_replay(
    name: str,
    recording: Recording,
    model: str,
    *,
    attacks: Sequence[str | Mapping[str, Any]] = (),
    recipe: Mapping[str, Any] | None = None,
    defense: Mapping[str, Any] | None = None,
    truth: Path | None = None,
    pool: Path | None = None,
    rounds: Sequence[int] = (),
    clients: Sequence[str] = (),
    examples: int | None = None,
    size: int | None = None,
    channels: int | None = None,
    classes: int | None = None,
    task: Any = None,
    threshold: float = 0.9,
    seed: int = 0,
    search_path: Sequence[Path] = (),
) -> Replay:
    """Checks what the user gave of one recording and builds the model from the first tensors that were sent.

    model: name of the zoo or `package.module:callable`. attacks: names or entries as in a spec; `DEFAULT_ATTACKS` if
    empty. recipe, defense: entries as in a spec. truth: folder with `CLIENT.npz` (`Truths`). pool: folder of images. rounds,
    clients: which updates, all if empty. Raises InputError for whatever does not fit.
    """
    updates = chosen_updates(name, recording, rounds, clients)
    tensors = next((sent.tensors for one in updates if (sent := recording.sent_to(one)) is not None), None)
    if tensors is None:
        raise DataError(
            f"recording '{name}': what the server sent was not recorded, and without it an update cannot be read; "
            "record the global model of each round too"
        )
    built = build_agreed(
        model, tensors, size=size, channels=channels, classes=classes, task=task, search_path=search_path
    )
    _check_fits(name, recording, updates, built)
    entries = tuple(
        attack_entry({"name": one} if isinstance(one, str) else one, f"--attack {number}", Path())
        for number, one in enumerate(attacks or DEFAULT_ATTACKS, start=1)
    )
    if twice := [entry.id for entry in entries if sum(other.id == entry.id for other in entries) > 1]:
        raise SpecError(f"--attack: '{twice[0]}' comes twice; give the second one a label")
    auxiliary, nulls = (None, None) if pool is None else _halves(pool, built)
    kind = observed_kind(updates[0])
    values = None if recipe is None else {"update": kind, **recipe}
    return Replay(
        name=name,
        recording=recording,
        updates=updates,
        model=built,
        attacks=entries,
        recipe=None if values is None else recipe_entry(values, "--recipe", Path()),
        defense=None if defense is None else defense_entry(defense, "--defense", Path()),
        truths=None if truth is None else Truths(truth, built),
        auxiliary=auxiliary,
        nulls=nulls,
        examples=examples,
        threshold=threshold,
        seed=seed,
    )


def _check_fits(name: str, recording: Recording, updates: Sequence[Recorded], model: GlobalModel) -> None:
    """Raises ModelError where nothing that was sent in the first updates fits: the recording is of another model."""
    wrong: ModelError | None = None
    for update in updates[:LOOKED_AT]:
        if (sent := recording.sent_to(update)) is None:
            continue
        try:
            matched_state(model, sent.tensors, f"recording '{name}': what the server sent in round {update.round}")
        except ModelError as error:
            wrong = wrong or error
        else:
            return
    if wrong is not None:
        raise wrong


def _halves(path: Path, model: GlobalModel) -> tuple[Auxiliary, Auxiliary]:
    """Every other image is auxiliary knowledge, the others give the null baselines."""
    channels, *sides = model.image_shape
    if channels not in (1, 3):
        raise DataError(f"--pool: images have 1 or 3 channels, the model takes {channels}; leave the pool out")
    images = load_dataset(FolderReader(path=path), name="--pool", size=tuple(sides), channels=1 if channels == 1 else 3)
    if len(images) < 2:
        raise DataError(f"--pool: '{path}' holds one image; give at least two")
    return (
        Auxiliary(images.images[::2], images.targets[::2]),
        Auxiliary(images.images[1::2], images.targets[1::2]),
    )
