"""A small network that takes white noise off images, learnt from few auxiliary images."""

from __future__ import annotations

import hashlib
from math import log

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medpfl.attacks.matching.learnt.variations import varied
from medpfl.models.randomness import isolated_randomness
from medpfl.models.shapes import CONVOLUTIONS

WEAKEST, STRONGEST = 0.02, 0.4
"""Deviations of the noise that it learns to take off."""

BATCH = 16
RATE = 2e-3

_KEPT: dict[tuple[object, ...], Denoiser] = {}
"""The last denoiser that was learnt, because the cases of an audit come in several chunks with the same images."""


class Denoiser(nn.Module):
    """Images (N, C, *spatial) and the deviation of their noise (N,) -> what is left without it; any size.

    Convolutions at three sizes with connections across (Ronneberger et al. 2015), the noise's deviation as one more
    channel (Zhang et al., FFDNet 2018); the network's output is the noise.
    """

    def __init__(self, channels: int, dimensions: int, width: int) -> None:
        super().__init__()
        convolution = CONVOLUTIONS[dimensions]

        def block(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(
                convolution(inputs, outputs, 3, padding=1),
                nn.SiLU(),
                convolution(outputs, outputs, 3, padding=1),
                nn.SiLU(),
            )

        self.fine, self.middle = block(channels + 1, width), block(width, 2 * width)
        self.coarse = block(2 * width, 2 * width)
        self.to_middle, self.to_fine = block(4 * width, 2 * width), block(3 * width, width)
        self.last = convolution(width, channels, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        if self.last.bias is not None:
            nn.init.zeros_(self.last.bias)

    def forward(self, images: Tensor, deviations: Tensor) -> Tensor:
        """See the class."""
        level = deviations.reshape(-1, *(1 for _ in images.shape[1:])).to(images)
        told = level.expand(len(images), 1, *images.shape[2:])
        fine = self.fine(torch.cat([images, told], dim=1))
        middle = self.middle(_halved(fine))
        coarse = self.coarse(_halved(middle))
        middle = self.to_middle(torch.cat([_resized(coarse, middle), middle], dim=1))
        fine = self.to_fine(torch.cat([_resized(middle, fine), fine], dim=1))
        noise: Tensor = self.last(fine)
        return images - (WEAKEST + level) * noise


def learnt_denoiser(images: Tensor, steps: int, width: int) -> Denoiser:
    """A denoiser of images like `images` (M, C, *spatial), after so many steps of Adam on batches of varied ones.

    The learning rate rises over the first tenth and falls along half a cosine. In single precision; always the same one
    for the same images, and the last one is kept.
    """
    digest = hashlib.sha256(images.detach().cpu().float().contiguous().numpy().tobytes()).hexdigest()
    key = (digest, tuple(images.shape), steps, width, str(images.device))
    if key not in _KEPT:
        found = _learnt(images, steps, width, torch.Generator().manual_seed(0))
        _KEPT.clear()
        _KEPT[key] = found
    return _KEPT[key]


def _learnt(images: Tensor, steps: int, width: int, generator: torch.Generator) -> Denoiser:
    shape, device = images.shape[1:], images.device
    with isolated_randomness(generator):
        net = Denoiser(shape[0], len(shape) - 1, width).to(device)
    rising = max(1, steps // 10)
    optimizer = torch.optim.Adam(net.parameters(), lr=RATE)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / rising, 0.5 + 0.5 * float(torch.cos(torch.tensor(torch.pi * step / steps)))),
    )
    for _ in range(steps):
        chosen = torch.randint(len(images), (BATCH,), generator=generator)
        clean = varied(images[chosen.to(device)].float(), generator)
        share = torch.rand(BATCH, generator=generator).to(device)
        deviations = WEAKEST * torch.exp(share * log(STRONGEST / WEAKEST))
        spread = deviations.reshape(-1, *(1 for _ in shape))
        noisy = clean + spread * torch.randn(clean.shape, generator=generator).to(device)
        loss = ((net(noisy, deviations) - clean).square().flatten(1).mean(dim=1) / deviations).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return net.eval().requires_grad_(False)


def _halved(images: Tensor) -> Tensor:
    return F.interpolate(images, size=[-(-side // 2) for side in images.shape[2:]], mode="area")


def _resized(images: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(images, size=like.shape[2:], mode="nearest")
