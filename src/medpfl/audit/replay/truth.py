"""Ground truth of a recording, for those who own it: one file of images for each client."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from medpfl.core.domain import GlobalModel
from medpfl.core.errors import DataError
from medpfl.federation.recording import Recorded
from medpfl.metrics.truth import GroundTruth


class Truths:
    """A folder with `CLIENT.npz`, or `CLIENT-round-7.npz` where a client's images differ from round to round.

    Each file has `images`, (N, C, *spatial) in [0, 1] or 8 bit, and `labels`, (N,) or (N, classes). Raises DataError where
    the folder holds no such file.
    """

    def __init__(self, folder: Path, model: GlobalModel) -> None:
        self._folder = folder
        self._model = model
        self._others: dict[str, tuple[Tensor, Tensor] | None] = {}
        self._files = {path.stem: path for path in sorted(folder.glob("*.npz"))} if folder.is_dir() else {}
        if not self._files:
            raise DataError(
                f"--truth '{folder}': expected a folder with one CLIENT.npz (images, labels) for each client, found none"
            )

    @property
    def fingerprint(self) -> str:
        """Digest of all files."""
        digest = hashlib.sha256()
        for name, path in self._files.items():
            digest.update(name.encode() + hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()[:16]

    def of(self, update: Recorded) -> GroundTruth | None:
        """What the client of an update held; None where there is no file of it."""
        for name in (f"{update.client}-round-{update.round}", update.client):
            if (path := self._files.get(name)) is not None:
                images, labels = self._read(path)
                return GroundTruth(images, labels, tuple(f"{name}/{index}" for index in range(len(images))))
        return None

    def others(self, update: Recorded) -> tuple[Tensor, Tensor] | None:
        """Images and labels of all other clients, each image once, for null baselines; None where there are none."""
        if update.client not in self._others:
            self._others[update.client] = self._gathered(update.client)
        return self._others[update.client]

    def _gathered(self, client: str) -> tuple[Tensor, Tensor] | None:
        found: dict[bytes, tuple[Tensor, Tensor]] = {}
        for name, path in self._files.items():
            if name.partition("-round-")[0] != client:
                for image, label in zip(*self._read(path), strict=True):
                    found.setdefault(image.numpy().tobytes(), (image, label))
        if not found:
            return None
        images, labels = zip(*found.values(), strict=True)
        return torch.stack(images), torch.stack(labels)

    def _read(self, path: Path) -> tuple[Tensor, Tensor]:
        try:
            with np.load(path, allow_pickle=False) as archive:
                images, labels = np.asarray(archive["images"]), np.asarray(archive["labels"])
        except KeyError as error:
            raise DataError(f"{path}: {error.args[0]}; expected arrays images and labels") from None
        except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
            raise DataError(f"{path}: cannot be read as npz ({str(error).splitlines()[0]})") from None
        found = torch.from_numpy(images.astype(np.float32) / (255.0 if images.dtype == np.uint8 else 1.0))
        expected = tuple(self._model.image_shape)
        if tuple(found.shape[1:]) != expected or len(labels) != len(found) or not len(found):
            raise DataError(
                f"{path}: images {tuple(found.shape)} with {len(labels)} labels; expected (N, {', '.join(map(str, expected))})"
                " as the model takes them, and as many labels"
            )
        if not bool(torch.isfinite(found).all()) or float(found.min()) < 0.0 or float(found.max()) > 1.0:
            raise DataError(
                f"{path}: pixels must lie in [0, 1], or be 8 bit; found {float(found.min()):.3g} to "
                f"{float(found.max()):.3g}"
            )
        whole = labels.ndim == 1
        return found, torch.from_numpy(labels.astype(np.int64 if whole else np.float32))
