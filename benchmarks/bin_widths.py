"""Ways to smooth the quantiles that MedLeak's bins begin at: how many images are alone in their bin, against the closed form.

    python benchmarks/bin_widths.py --data "ISIC 2017 color" --divisions 60

Kernels of several widths, in units of Silverman's; the width with the largest leave-one-out likelihood on the server's
images; mixtures with a normal distribution, of given and of cross-validated weight; and, as a bound, bins from the very
images that are attacked. The expected share over all batches of a division is computed exactly: an image is alone with
the hypergeometric probability that no other image of its bin is drawn.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from medleak_data import FILES, sets
from scipy.stats import hypergeom
from torch import Tensor

from medpfl.attacks.brightness_bins import bins_of, brightness, empirical_edges, kernel_width, smoothed_edges
from medpfl.core.seeding import generator

FACTORS = (0.3, 0.5, 0.7, 1.0, 1.4, 2.0, 3.0)
SHARES = (0.1, 0.2, 0.3, 0.5, 0.7)


def alone_share(values: Tensor, edges: Tensor, size: int) -> float:
    """Expected share of so many of the images, drawn without replacement, that are alone in their bin."""
    bins = bins_of(values, edges).numpy()
    held = np.bincount(bins[bins >= 0], minlength=len(edges))[bins]
    found = hypergeom.pmf(0, len(values) - 1, held - 1, size - 1)
    return float(np.where(bins >= 0, found, 0).mean())


def mixed_edges(values: Tensor, units: int, width: float, normal: float = 0.0) -> Tensor:
    """Quantiles of kernels of that width, mixed with a normal distribution of weight `normal`."""
    mean, deviation = values.mean(), values.std()
    grid = torch.linspace(float(mean - 8 * deviation), float(mean + 8 * deviation), 8192, dtype=torch.float64)
    cumulative = (1 - normal) * torch.special.ndtr((grid[:, None] - values) / width).mean(dim=1)
    cumulative += normal * torch.special.ndtr((grid - mean) / deviation)
    inner = np.interp(np.arange(1, units) / units, cumulative.numpy(), grid.numpy())
    return torch.cat([torch.tensor([-1.0], dtype=torch.float64), torch.from_numpy(inner)])


def densities(values: Tensor, width: float) -> Tensor:
    """Leave-one-out density of the kernels at each value."""
    kernels = torch.exp(-(((values[:, None] - values) / width) ** 2) / 2) / (width * (2 * torch.pi) ** 0.5)
    return kernels.fill_diagonal_(0).sum(dim=1) / (len(values) - 1) + 1e-12


def placed(own: Tensor, attacked: Tensor, units: int) -> Iterator[tuple[str, Tensor]]:
    """All ways by name, with their edges."""
    silverman = kernel_width(own)
    yield "as they are", empirical_edges(own, units)
    yield "Silverman", smoothed_edges(own, units)
    for factor in FACTORS:
        yield f"{factor:g} x Silverman", mixed_edges(own, units, factor * silverman)
    width = max((factor * silverman for factor in FACTORS), key=lambda one: float(densities(own, one).log().sum()))
    yield "likeliest width", mixed_edges(own, units, width)
    normal = torch.exp(-(((own - own.mean()) / own.std()) ** 2) / 2) / (own.std() * (2 * torch.pi) ** 0.5)
    kernels = densities(own, silverman)
    best = max((0.0, *SHARES), key=lambda share: float(((1 - share) * kernels + share * normal).log().sum()))
    yield "likeliest mixture with a normal distribution", mixed_edges(own, units, silverman, best)
    for share in (0.3, 0.5):
        yield f"mixture, {share:g} normal", mixed_edges(own, units, silverman, share)
    yield "from the attacked images (bound)", smoothed_edges(attacked, units)


def main(arguments: Sequence[str] | None = None) -> None:
    """Prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=tuple(FILES), default="ISIC 2017 color")
    parser.add_argument("--divisions", type=int, default=60)
    parser.add_argument("--images", type=int, default=256, help="of a batch")
    parser.add_argument("--units", type=int, default=512)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    ((_, data),) = sets([options.data])
    values, gaps = brightness(data.images), defaultdict(list)
    expected = (1 - 1 / options.units) ** (options.images - 1)
    for seed in range(options.divisions):
        order = torch.randperm(len(values), generator=generator("bins", options.data, seed))
        own, attacked = values[order[: len(values) // 2]], values[order[len(values) // 2 :]]
        for name, edges in placed(own, attacked, options.units):
            gaps[name].append(alone_share(attacked, edges, options.images) - expected)
    print("| quantiles | mean gap | standard deviation over divisions |\n| --- | --- | --- |")
    for name, found in gaps.items():
        print(f"| {name} | {np.mean(found):+.4f} | {np.std(found):.4f} |")


if __name__ == "__main__":
    main()
