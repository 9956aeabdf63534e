"""How often the best blind guess succeeds, estimated from images that the adversary may own."""

from __future__ import annotations

import torch
from torch import Tensor

from medpfl.core.functional import ssim

MOST_GUESSES = 64
"""Images that are tried as the one guess, besides the mean of all; fewer where images are large."""

MOST_IMAGES = 256
"""Images that guesses are tried on."""

MOST_PIXELS = 5 * 10**7
"""Pixels that are compared in all."""


def prior_success(images: Tensor, threshold: float) -> float:
    """The largest share of images (M, C, *spatial) in [0, 1] that one guess meets: SSIM at the threshold or above.

    Guesses are the images themselves and their mean, so that a guess meets at least itself: never below 1 / M, which
    is all that M images can say. Of many images the first ones are used. Raises ValueError without images.

    >>> float(prior_success(torch.zeros(4, 1, 16, 16), 0.9))
    1.0
    """
    if not len(images):
        raise ValueError("the success of a blind guess needs at least one image")
    kept = images[:MOST_IMAGES].float()
    tried = max(1, min(MOST_GUESSES, MOST_PIXELS // kept.numel()))
    guesses = torch.cat([kept[:tried], kept.mean(dim=0, keepdim=True)])
    shares = [float((ssim(guess.expand_as(kept), kept) >= threshold).double().mean()) for guess in guesses]
    return max(1 / len(kept), *shares)
