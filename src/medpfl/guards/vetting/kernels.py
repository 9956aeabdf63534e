"""Convolutions that copy their input instead of filtering it, so that a layer behind them sees the image."""

from __future__ import annotations

import torch

from medpfl.guards.vetting.base import Evidence, Measured, check, worst
from medpfl.guards.vetting.layers import Weighted

FEWEST_ENTRIES = 4
"""Kernels with fewer entries along their axes are not looked at: one entry copies whatever it is."""

COPIES = 10.0
"""Transmit-SNR from which a kernel counts as a copy: one entry ten times as large as all others together. Heavy pruning
leaves such kernels too, but each with its entry at another place."""


def transmit_snr(layer: Weighted) -> torch.Tensor:
    """max |w| / (sum |w| - max |w|) of every kernel (channels,); 0 of a kernel that is all zeros.

    >>> kernels = torch.zeros(2, 1, 3, 3)
    >>> kernels[0, 0, 1, 1], kernels[1] = 5.0, 1.0
    >>> [f"{value:.3g}" for value in transmit_snr(Weighted("conv", kernels, None))]
    ['5e+12', '0.125']
    """
    sizes = layer.weight.abs().flatten(1)
    largest, total = sizes.amax(dim=1).double(), sizes.sum(dim=1, dtype=torch.float64)
    return largest / (total - largest).clamp_min(1e-12)


@check(
    "copying_kernels",
    about="structure",
    means="crafted",
    threshold=0.9,
    summary="a convolution whose kernels copy one input channel or are all zero (transmit-SNR)",
    paper="transmit-SNR: Garov et al.: Hiding in Plain Sight, ICLR 2024; kernels: LOKI, Robbing the Fed, ARES",
    limits="depthwise convolutions are left out, because trained ones copy too",
)
def copying_kernels(evidence: Evidence) -> Measured | None:
    """The share of kernels that are zero or copy from one offset, of layers in which a kernel copies."""
    found = []
    for place, layer in enumerate(evidence.layers.convolutions):
        depthwise = place > 0 and layer.weight.shape[1] == 1
        if not depthwise and layer.weight[0, 0].numel() >= FEWEST_ENTRIES:
            found.append(_copying(layer))
    return worst(found)


def _copying(layer: Weighted) -> Measured:
    ratios = transmit_snr(layer)
    copies = ratios >= COPIES
    zeros = int((ratios == 0).sum())
    offsets = layer.weight[copies].abs().flatten(2).amax(dim=1).argmax(dim=1)
    together = int(offsets.bincount().max()) if len(offsets) else 0
    share = (together + zeros) / len(ratios) if together else 0.0
    seen = f"{together} of {len(ratios)} kernels copy one channel at one place and {zeros} are zero"
    return Measured(share, layer.name, f"{seen} (largest transmit-SNR {float(ratios.max()):.2g})")
