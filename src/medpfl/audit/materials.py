"""What cases are made of: data, splits, models and auxiliary knowledge, each made once per process and seed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from medpfl.audit.clients_needed import ClientsNeeded
from medpfl.audit.entries import DataEntry, ModelEntry
from medpfl.audit.grid import Cell
from medpfl.audit.snapshots import FileSession, Watched
from medpfl.audit.spec import Spec
from medpfl.audit.targets import targets_of, task_of
from medpfl.audit.trained_models import (
    alone,
    another_trained_model,
    changed_by,
    meets,
    model_key,
    model_kind,
    training_kind,
)
from medpfl.core.devices import CPU, moved, repeatable
from medpfl.core.domain import Auxiliary, GlobalModel
from medpfl.core.errors import Refused, SpecError
from medpfl.core.seeding import content_hash, generator
from medpfl.core.session import State
from medpfl.data import Borrowed, Dataset, Split, borrow, load_dataset, split
from medpfl.federation.training import TrainingConfig, at_step, train
from medpfl.metrics.truth import GroundTruth
from medpfl.models import build_model, imagenet_weights, load_checkpoint
from medpfl.models.state import fingerprint, load_model, save_model

T = TypeVar("T")


@dataclass(frozen=True)
class Pool:
    """A data entry's images and how they are divided for one seed."""

    dataset: Dataset
    split: Split
    fingerprint: str


class Materials:
    """Makes and keeps what a process needs. Everything follows from the spec and the cache folder.

    threads: with how many threads models are trained, whatever the process uses otherwise: their number changes bits.
    device: where `model` puts models, and where they are trained; all else stays on the CPU.
    training: is told which model is being trained and how far it has come (0 to 1).
    known: fingerprints of trained models by `model_key`; another model under that name raises StoreError.
    """

    def __init__(
        self,
        spec: Spec,
        cache: Path,
        clients_needed: Mapping[str, ClientsNeeded],
        threads: int = 1,
        device: torch.device = CPU,
        training: Callable[[str, float], object] | None = None,
        known: Mapping[str, str] | None = None,
    ) -> None:
        self.spec = spec
        self._threads = threads
        self.device = device
        self._known = dict(known or {})
        self.trained: dict[str, str] = {}
        """Fingerprints of the trained models that were made so far, by `model_key`."""
        self._tell = training or (lambda *_: None)
        self._cache_folder = cache
        self._clients_needed = clients_needed
        self._kept: dict[tuple[Any, ...], Any] = {}

    def once(self, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        """What `make` gives, made when the key is first asked for."""
        if key not in self._kept:
            self._kept[key] = make()
        found: T = self._kept[key]
        return found

    def latest(self, kind: str, key: tuple[Any, ...], make: Callable[[], T]) -> T:
        """As `once`, but only the last value of a kind is kept: for what is large and used for a while."""
        held = self._kept.get((kind,))
        if held is None or held[0] != key:
            self._kept.pop((kind,), None)
            held = self._kept[(kind,)] = (key, make())
        found: T = held[1]
        return found

    def dataset(self, entry: DataEntry) -> Dataset:
        """All images of a data entry at its size. Raises DataError."""
        settings = entry.settings
        return self.once(
            ("dataset", entry.id),
            lambda: load_dataset(
                entry.reader,
                name=entry.id,
                size=settings.size,
                channels=settings.channels,
                aspect=settings.aspect,
                maximum=settings.maximum,
            ),
        )

    def pool(self, entry: DataEntry, seed: int) -> Pool:
        """A data entry divided for one seed. Raises DataError when there are too few images."""

        def make() -> Pool:
            dataset, needed = self.dataset(entry), self._clients_needed.get(entry.id, ClientsNeeded())
            divided = split(
                dataset,
                victims=entry.settings.victims,
                images_per_victim=needed.images,
                bystanders=needed.bystanders,
                seed=seed,
                near_duplicate_threshold=entry.settings.near_duplicates,
            )
            parts: tuple[Any, ...] = (divided.victims, divided.training, divided.auxiliary, divided.null)
            parts += (divided.bystanders,) if divided.bystanders else ()
            return Pool(dataset, divided, _fingerprint(dataset, parts))

        return self.once(("pool", entry.id, seed), make)

    def truth(self, cell: Cell, seed: int, victim: int) -> GroundTruth:
        """What is scored: what a victim holds under the cell's recipe, or all clients of its round."""
        return self._held(cell, seed, victim, range(cell.channel.channel.scored_clients))

    def everybody(self, cell: Cell, seed: int, victim: int, clients: Sequence[int]) -> GroundTruth:
        """What these clients of a victim's round hold: the images that the update is of, if they sent theirs."""
        return self._held(cell, seed, victim, clients)

    def client(self, cell: Cell, seed: int, victim: int, client: int) -> GroundTruth:
        """What one client of a victim's round holds; 0 is the victim, the others are bystanders."""
        return self._held(cell, seed, victim, [client])

    def _held(self, cell: Cell, seed: int, victim: int, clients: Sequence[int]) -> GroundTruth:
        pool, size = self.pool(cell.dataset, seed), cell.recipe.recipe.private_images
        held = (pool.split.victims[victim], *pool.split.bystanders)
        indices = [index for client in clients for index in held[client][:size]]
        dataset = pool.dataset
        return GroundTruth(
            images=dataset.images[indices],
            labels=dataset.targets[indices],
            items=tuple(dataset.items[index] for index in indices),
            masks=dataset.masks[indices] if dataset.masks is not None and cell.model.segments else None,
            clients=tuple(client for client in clients for _ in held[client][:size]),
        )

    def null_images(self, cell: Cell, seed: int) -> tuple[Tensor, Tensor]:
        """Images and targets of the pool's null part."""
        pool = self.pool(cell.dataset, seed)
        indices = list(pool.split.null)
        return pool.dataset.images[indices], pool.dataset.targets[indices]

    def auxiliary(self, cell: Cell, seed: int) -> Auxiliary | None:
        """The images that the cell's adversary owns, None if none were granted."""
        threat_model = cell.threat_model
        if "auxiliary" not in threat_model.knows:
            return None
        pool = self.pool(cell.dataset, seed)
        if threat_model.auxiliary is None:
            indices = list(pool.split.auxiliary)
            return Auxiliary(pool.dataset.images[indices], pool.dataset.targets[indices])
        source, borrowed = self.borrowed(cell.dataset, threat_model.auxiliary, seed)
        indices = list(borrowed.indices)
        return Auxiliary(source.images[indices], source.targets[indices])

    def borrowed(self, entry: DataEntry, other: str, seed: int) -> tuple[Dataset, Borrowed]:
        """What of the data entry with the id `other` is auxiliary knowledge against the victims of `entry`."""

        def make() -> tuple[Dataset, Borrowed]:
            lender = self.spec.entry("dataset", other)
            assert isinstance(lender, DataEntry)  # _check_auxiliary found it among the data entries
            pool, source = self.pool(entry, seed), self.dataset(lender)
            if source.images.shape[1:] != pool.dataset.images.shape[1:]:
                raise SpecError(
                    f"data entry '{other}' gives images {tuple(source.images.shape[1:])}, but as auxiliary knowledge "
                    f"for '{entry.id}' they must be {tuple(pool.dataset.images.shape[1:])}; give both the same size "
                    "and channels"
                )
            private = [index for held in (*pool.split.victims, *pool.split.bystanders) for index in held]
            return source, borrow(source, pool.dataset, private, entry.settings.near_duplicates)

        return self.once(("borrowed", entry.id, other, seed), make)

    def data_fingerprints(self, cell: Cell, seed: int) -> dict[str, str]:
        """Identifies the images that the cell's cases are made of, and how they are divided, by what they are for."""
        entry, lender = cell.dataset, cell.threat_model.auxiliary
        found = {f"{entry.id}/s{seed}": self.pool(entry, seed).fingerprint}
        if lender is not None:
            source, borrowed = self.borrowed(entry, lender, seed)
            found[f"{lender} as auxiliary knowledge for {entry.id}/s{seed}"] = _fingerprint(source, borrowed.indices)
        return found

    def model(self, cell: Cell, seed: int, victim: int | None = None) -> GlobalModel:
        """The model that the server sends, as the cell's defense has it; `victim` matters for `untrained_per_victim`.

        A trained model comes from the cache folder, or is trained now while other processes that need it wait.
        """
        key = ("placed", *model_kind(cell), seed, victim if cell.model.state == "untrained_per_victim" else None)
        return self.once(key, lambda: moved(self._made(cell, seed, victim), self.device))

    def _made(self, cell: Cell, seed: int, victim: int | None) -> GlobalModel:
        return self._checked(cell, seed) if cell.model.state == "trained" else self.initial_model(cell, seed, victim)

    def initial_model(self, cell: Cell, seed: int, victim: int | None = None) -> GlobalModel:
        """The same before any training here: what all checks look at, because it costs no time."""
        key = victim if cell.model.state == "untrained_per_victim" else None
        return self.once(("model", *model_kind(cell), seed, key), lambda: self._make_model(cell, seed, key))

    def why_no_model(self, cell: Cell, seed: int) -> str | None:
        """Why the cell's defense cannot be applied to its model at all, None if it can."""
        try:
            self.initial_model(cell, seed, 0)
        except Refused as reason:
            return str(reason)
        return None

    def _make_model(self, cell: Cell, seed: int, victim: int | None) -> GlobalModel:
        key = ("built", cell.dataset.id, cell.model.id, seed, victim)
        return cell.defense.defense.model(self.once(key, lambda: self._built(cell, seed, victim)))

    def _built(self, cell: Cell, seed: int, victim: int | None) -> GlobalModel:
        data, entry = cell.dataset, cell.model
        dataset = self.dataset(data)
        keys = [seed, data.id, entry.name] if victim is None else [seed, data.id, entry.name, victim]
        model = build_model(
            entry.source,
            image_shape=tuple(dataset.images.shape[1:]),
            task=task_of(dataset, entry),
            normalize=entry.normalize,
            generator=generator("model", *keys),
            search_path=self.spec.factory_folders,
        )
        if entry.state == "imagenet":
            return imagenet_weights(model)[0]
        if entry.state == "checkpoint":
            assert entry.checkpoint is not None  # set together with the state
            return load_checkpoint(model, entry.checkpoint)
        return model

    def training_images(self, data: DataEntry, entry: ModelEntry, seed: int) -> list[int]:
        """Places of the images that a trained model is trained on. Raises SpecError when there are none."""
        assert entry.training is not None  # set together with the state
        divided = self.pool(data, seed).split
        indices = list(divided.training)
        if entry.training.victims == "included":
            indices += [index for group in divided.victims for index in group]
        if not indices:
            raise SpecError(
                f"models '{entry.id}': '{data.id}' leaves no images to train on; use fewer victims or more images"
            )
        return indices

    def _checked(self, cell: Cell, seed: int) -> GlobalModel:
        name, model = model_key(cell, seed), self._trained(cell, seed)
        self.trained[name] = fingerprint(model)
        if self._known.get(name, self.trained[name]) != self.trained[name]:
            raise another_trained_model(name, self._cache_folder.parent)
        return model

    def _trained(self, cell: Cell, seed: int) -> GlobalModel:
        initial, (path, key) = self.initial_model(cell, seed), self._cached(cell, seed)
        kind = content_hash(training_kind(cell.model), seed, cell.dataset.id, *changed_by(cell))
        with alone(self._cache_folder / f"training-{kind}"):
            while not path.exists():
                self._train(initial, cell, seed)
            return load_model(initial, path, key=key)

    def _cached(self, cell: Cell, seed: int) -> tuple[Path, str]:
        """Where a trained model is kept, and what identifies its content."""
        made_of = (self.pool(cell.dataset, seed).fingerprint, fingerprint(self.initial_model(cell, seed)))
        key = content_hash(cell.model.params, seed, cell.dataset.id, *made_of, *changed_by(cell))
        return self._cache_folder / f"model-{key}.safetensors", key

    def _train(self, initial: GlobalModel, cell: Cell, seed: int) -> None:
        """One training run to the longest of the audit's stages of this training, keeping every stage on the way."""
        data, entry = cell.dataset, cell.model
        dataset, indices = self.dataset(data), self.training_images(data, entry, seed)
        missing: dict[int, tuple[TrainingConfig, Path, str]] = {}
        for other in self.spec.models:
            if other.training is not None and training_kind(other) == training_kind(entry) and meets(other, data):
                path, key = self._cached(replace(cell, model=other), seed)
                if not path.exists():
                    missing[other.training.total_steps(len(indices))] = (other.training, path, key)
        name, last = model_key(cell, seed), max(missing)
        config, path, _ = missing[last]

        def keep(done: int, state: Callable[[], State]) -> None:
            if done in missing:
                save_model(at_step(initial, state()), missing[done][1], key=missing[done][2])

        session = FileSession(self._cache_folder, path.name, lambda fraction: self._tell(name, fraction))
        stream = generator("training", seed, data.id, *training_kind(entry))
        with repeatable(self.device, self._threads):
            images, targets = dataset.images[indices], targets_of(dataset, entry)[indices]
            train(moved(initial, self.device), images, targets, config, stream, Watched(session, keep))
        session.close()
        self._tell(name, 1.0)


def _fingerprint(dataset: Dataset, places: tuple[Any, ...]) -> str:
    """Identifies pixels, targets and which of them are used, so that a resumed audit notices changed files."""
    digest = hashlib.sha256()
    digest.update(dataset.images.to(torch.float32).contiguous().numpy().tobytes())
    digest.update(dataset.targets.to(torch.float32).contiguous().numpy().tobytes())
    if dataset.masks is not None:
        digest.update(dataset.masks.contiguous().numpy().tobytes())
    digest.update(repr(places).encode())
    return digest.hexdigest()[:16]
