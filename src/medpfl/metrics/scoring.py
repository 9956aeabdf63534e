"""One score per private image: what came back for it, and how close that is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from medpfl.core.domain import Reconstruction
from medpfl.core.errors import AttackFailure
from medpfl.core.functional import assignment, mse, psnr, ssim
from medpfl.metrics.legacy import Normalization, legacy_scores
from medpfl.metrics.masks import mask_dice
from medpfl.metrics.truth import GroundTruth

Label = int | list[int]
"""A class index, or 0/1 per class for multi-label data."""


@dataclass(frozen=True)
class ImageScore:
    """How one private image came off.

    candidate: rank of the reconstruction that was assigned to it (0 is what the attack ranked best), None where
    nothing was left and the adversary's fallback was scored. candidates: how many reconstructions came back.
    psnr (dB), ssim and mse are in [0, 1] image space with range 1; success is SSIM at the threshold or above.
    label_inferred is the label of the assigned candidate, None where none was inferred, and label_correct with it.
    legacy_ssim and legacy_mse follow the source paper's own convention. image: the (C, *spatial) that was scored.
    mask: the assigned candidate's mask (*spatial), and mask_dice its agreement with the true one; None without either.
    """

    position: int
    item: str
    candidate: int | None
    candidates: int
    psnr: float
    ssim: float
    mse: float
    success: bool
    label: Label
    label_inferred: Label | None
    label_correct: bool | None
    legacy_ssim: float
    legacy_mse: float
    image: Tensor
    mask: Tensor | None = None
    mask_dice: float | None = None


def score(
    reconstruction: Reconstruction | None,
    truth: GroundTruth,
    *,
    fallback: Tensor,
    threshold: float = 0.9,
    convention: str = "range_1",
    normalization: Normalization | None = None,
) -> list[ImageScore]:
    """Scores every private image of a victim, in the order of `truth`.

    Candidates are assigned to private images so that the summed MSE is least, whatever order they came in. A private
    image without a candidate is scored against `fallback` (C, *spatial), the adversary's best guess without an
    update. `reconstruction` None means that nothing came back. `threshold` is the SSIM of a success; `convention` and
    `normalization` belong to the legacy columns only (`medpfl.metrics.legacy`), which see the unclamped result.

    Raises AttackFailure where the reconstruction is not finite or has another shape than the private images, and
    InputError where the images are too small for SSIM.
    """
    candidates = _candidates(reconstruction, truth)
    unclamped = _unclamped(reconstruction, candidates)
    chosen = _assign(truth.images, candidates)
    filler = fallback.to(candidates.device, candidates.dtype).expand(candidates.shape[1:])
    images = torch.stack([filler if rank is None else candidates[rank] for rank in chosen]).clamp(0.0, 1.0)
    raw = torch.stack([filler if rank is None else unclamped[rank] for rank in chosen])

    psnrs, ssims, errors = psnr(truth.images, images), ssim(truth.images, images), mse(truth.images, images)
    legacy_ssims, legacy_errors = legacy_scores(truth.images, raw, convention, normalization)
    inferred = None if reconstruction is None else reconstruction.labels
    scores = []
    for position, rank in enumerate(chosen):
        label = as_label(truth.labels[position])
        mask = None if reconstruction is None or rank is None else _mask(reconstruction, truth, rank)
        label_inferred = None if inferred is None or rank is None else _inferred_label(inferred[rank], label)
        scores.append(
            ImageScore(
                position=position,
                item=truth.items[position],
                candidate=rank,
                candidates=len(candidates),
                psnr=float(psnrs[position]),
                ssim=float(ssims[position]),
                mse=float(errors[position]),
                success=bool(ssims[position] >= threshold),
                label=label,
                label_inferred=label_inferred,
                label_correct=None if label_inferred is None else label_inferred == label,
                legacy_ssim=float(legacy_ssims[position]),
                legacy_mse=float(legacy_errors[position]),
                image=images[position],
                mask=mask,
                mask_dice=None
                if mask is None or truth.masks is None
                else float(mask_dice(mask[None], truth.masks[position][None])),
            )
        )
    return scores


def _mask(reconstruction: Reconstruction, truth: GroundTruth, rank: int) -> Tensor | None:
    """The mask of a candidate, where the attack found one and there is a true one."""
    if reconstruction.masks is None or truth.masks is None:
        return None
    mask = reconstruction.masks[rank].detach().to(truth.masks.device)
    if mask.shape != truth.masks.shape[1:]:
        raise AttackFailure(
            f"the attack returned masks of shape {tuple(mask.shape)}, the private ones have "
            f"{tuple(truth.masks.shape[1:])}"
        )
    return mask


def pairwise_mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error of every image of `a` with every image of `b`: (N, ...) and (M, ...) -> (N, M), float64."""
    x, y = a.double().flatten(1), b.double().flatten(1)
    squares = x.square().sum(1)[:, None] + y.square().sum(1)[None, :]
    return ((squares - 2.0 * x @ y.T) / x.shape[1]).clamp_min(0.0)


def as_label(label: Tensor) -> Label:
    """A row of labels as plain numbers: a class index, or 0/1 per class.

    >>> as_label(torch.tensor(3)), as_label(torch.tensor([0.0, 1.0]))
    (3, [0, 1])
    """
    return int(label) if label.ndim == 0 else [int(value >= 0.5) for value in label.tolist()]


def _inferred_label(inferred: Tensor, truth: Label) -> Label:
    """The inferred label in the form of the true one: soft labels go to their largest class, or to 0/1 at 0.5."""
    if isinstance(truth, int):
        return int(inferred) if inferred.ndim == 0 else int(inferred.argmax())
    if inferred.ndim == 0:
        return [int(index == int(inferred)) for index in range(len(truth))]
    return as_label(inferred)


def _candidates(reconstruction: Reconstruction | None, truth: GroundTruth) -> Tensor:
    if reconstruction is None:
        return truth.images[:0]
    images = reconstruction.images.detach()
    if images.shape[1:] != truth.images.shape[1:]:
        raise AttackFailure(
            f"the attack returned images of shape {tuple(images.shape[1:])}, the private ones have "
            f"{tuple(truth.images.shape[1:])}"
        )
    if not bool(torch.isfinite(images).all()):
        raise AttackFailure("the attack returned images with values that are not finite")
    return images.to(truth.images.device).clamp(0.0, 1.0)


def _unclamped(reconstruction: Reconstruction | None, candidates: Tensor) -> Tensor:
    """The candidates before clamping where the attack kept them, else as they are."""
    if reconstruction is None or reconstruction.unclamped is None:
        return candidates
    unclamped = reconstruction.unclamped.detach().to(candidates.device, candidates.dtype)
    if unclamped.shape != candidates.shape:
        raise AttackFailure(
            f"the attack returned {tuple(unclamped.shape)} values before clamping and {tuple(candidates.shape)} after"
        )
    return unclamped


def _assign(truth: Tensor, candidates: Tensor) -> list[int | None]:
    """For every private image the rank of its candidate, or None."""
    chosen: list[int | None] = [None] * len(truth)
    if len(candidates):
        rows, columns = assignment(pairwise_mse(truth, candidates))
        for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
            chosen[row] = column
    return chosen
