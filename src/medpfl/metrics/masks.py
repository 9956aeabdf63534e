"""How close two segmentation masks are."""

from __future__ import annotations

import torch
from torch import Tensor


def mask_dice(found: Tensor, true: Tensor) -> Tensor:
    """Dice coefficient per image, int64 (N, *spatial) twice -> (N,), float64 from 0 to 1.

    2 |A and B| / (|A| + |B|) for each class but 0, the background, that either mask has; mean over these classes. Two
    masks of nothing but background agree: 1.

    >>> mask_dice(torch.tensor([[0, 1, 1, 2]]), torch.tensor([[0, 1, 0, 2]])).round(decimals=4).tolist()
    [0.8333]
    """
    scores = []
    for one, other in zip(found, true, strict=True):
        classes = [kind for kind in torch.unique(torch.stack([one, other])).tolist() if kind != 0]
        shares = [
            2.0 * float(((one == kind) & (other == kind)).sum()) / float((one == kind).sum() + (other == kind).sum())
            for kind in classes
        ]
        scores.append(sum(shares) / len(shares) if shares else 1.0)
    return torch.tensor(scores, dtype=torch.float64)
