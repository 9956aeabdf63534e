"""Independent noise on every trainable entry of an update."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from medpfl.core.domain import Update

NO_GUARANTEE = (
    "{noise} noise without clipping of each image's gradient: nothing bounds what one image changes, so the noise "
    "gives no differential-privacy guarantee, and what is measured holds for the audited attacks only"
)


def with_noise(update: Update, draw: Callable[[torch.Size], Tensor]) -> Update:
    """The update with `draw(shape)` added to every trainable tensor, in order; buffers and counters stay."""
    noisy = {name: tensor + draw(tensor.shape).to(tensor) for name, tensor in update.trainable.items()}
    return replace(update, trainable=noisy)
