"""What the limit of the checks for traps in dense-first nets rests on: their scores on honest nets and on traps.

    python benchmarks/trap_limits.py --data ../shared/data --nets 100

Honest nets of widths, activations, initializations and recipes that the detector's benchmark does not have, looked at
untrained and after 4, 40, 200 and 600 steps, and traps of both signs and tunings for 8 to 128 images. Prints the highest
scores of `one_sided_units` and `one_sided_rows` among honest looks, and the lowest of `one_sided_units` among traps by
the number of images that they are for.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from detector.data import Draw, drawn, sources
from torch import Tensor, nn

from medpfl.attacks.trap_weights import Signs, drawn_traps, with_factor, with_thresholds
from medpfl.guards.vetting.one_sided import one_sided

WIDTHS = ((300,), (1024,), (400, 200), (96, 96, 96), (64,), (640, 320, 100))
ACTIVATIONS: tuple[type[nn.Module], ...] = (
    nn.ReLU,
    nn.ReLU,
    nn.ReLU,
    nn.LeakyReLU,
    nn.GELU,
    nn.SiLU,
    nn.ELU,
    nn.Sigmoid,
)
STEPS = (0, 4, 40, 200, 600)
IMAGES = 16
TRAPS_FOR = (8, 16, 32, 64, 128)

Optimizing = Callable[[nn.Module], torch.optim.Optimizer]
OPTIMIZERS: tuple[Optimizing, ...] = (
    lambda net: torch.optim.SGD(net.parameters(), 0.05),
    lambda net: torch.optim.SGD(net.parameters(), 0.5),
    lambda net: torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=1e-4),
    lambda net: torch.optim.Adam(net.parameters(), 1e-3),
    lambda net: torch.optim.Adam(net.parameters(), 1e-2),
    lambda net: torch.optim.AdamW(net.parameters(), 3e-3, weight_decay=0.1),
)
INITIALIZERS: tuple[Callable[[Tensor], object] | None, ...] = (
    None,
    nn.init.kaiming_normal_,
    nn.init.xavier_uniform_,
    nn.init.orthogonal_,
    lambda weight: nn.init.normal_(weight, std=0.01),
)

Scores = tuple[float, float]
"""Of `one_sided_units` and of `one_sided_rows`."""


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=None, help="folder with the real images; drawings only without")
    parser.add_argument("--nets", type=int, default=100, help="honest nets, and traps (100)")
    parser.add_argument("--first", type=int, default=0, help="seed of the first")
    options = parser.parse_args()
    torch.set_num_threads(1)
    names = tuple(sources(options.data))
    honest: list[Scores] = []
    traps: dict[int, list[float]] = {count: [] for count in TRAPS_FOR}
    for seed in range(options.first, options.first + options.nets):
        torch.manual_seed(seed)
        draw, own = drawn_for(names, options.data, seed)
        honest += honest_scores(draw, own, random.Random(seed))
        count = TRAPS_FOR[seed % len(TRAPS_FOR)]
        traps[count].append(trap_score(draw, own, count, random.Random(seed)))
    for place, name in enumerate(("one_sided_units", "one_sided_rows")):
        highest = sorted((scores[place] for scores in honest), reverse=True)[:5]
        print(f"{name}: {len(honest)} honest looks, highest {' '.join(f'{score:.2f}' for score in highest)}")
    for count, found in traps.items():
        if found:
            print(f"traps for {count} images: {len(found)}, lowest {min(found):.2f}")


def drawn_for(names: tuple[str, ...], folder: Path | None, seed: int) -> tuple[Draw, Tensor]:
    """A set's images for the seed, and the client's own."""
    generator = torch.Generator().manual_seed(seed)
    draw = drawn(names[seed % len(names)], folder, IMAGES, generator)
    return draw, draw.batch(draw.client).images.flatten(1)


def honest_scores(draw: Draw, own: Tensor, chosen: random.Random) -> Iterator[Scores]:
    """Of one net at several stages of its training, as it is, pruned or rounded."""
    data = draw.batch(draw.others)
    images, targets = data.images.flatten(1), data.targets
    mean, scale = chosen.choice(((0.0, 1.0), (0.5, 0.25)))
    net = _net(own.shape[1], draw.data.task.classes, chosen)
    first = net[0]
    optimizer = chosen.choice(OPTIMIZERS)(net)
    for step in range(STEPS[-1] + 1):
        if step in STEPS:
            if not bool(torch.isfinite(first.weight).all()):
                return
            weight = chosen.choice((_same, _same, _pruned, _rounded))(first.weight.detach())
            yield scores_of(weight, first.bias.detach(), (own - mean) / scale)
        places = torch.randint(len(images), (16,))
        loss = nn.functional.cross_entropy(net((images[places] - mean) / scale), targets[places])
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()


def trap_score(draw: Draw, own: Tensor, count: int, chosen: random.Random) -> float:
    """`one_sided_units` of traps that each are on for one of so many images."""
    auxiliary = draw.batch(draw.auxiliary if len(draw.auxiliary) else draw.others).images.flatten(1)
    signs: Signs = chosen.choice(("independent", "mirrored"))
    units = chosen.choice((64, 200, 300, 1024))
    traps = drawn_traps(units, auxiliary.shape[1], 1.0, signs, torch.Generator().manual_seed(chosen.randrange(2**31)))
    tuned = chosen.choice((with_factor, with_thresholds))(traps, auxiliary, 1 / count)
    return scores_of(*tuned.tensors(0.1), own)[0]


def scores_of(weight: Tensor, bias: Tensor, seen: Tensor) -> Scores:
    """Both checks' scores of a first layer (units, inputs) that sees these images (N, inputs)."""
    kept = weight.any(dim=1)
    rows, lengths = weight[kept], weight[kept].norm(dim=1)
    answers = ((seen @ rows.T + bias[kept]).mean(dim=0) / lengths).double()
    at_work = one_sided(rows, seen.mean(dim=0), answers, "first").score
    return at_work, one_sided(rows, torch.ones(rows.shape[1]), (rows.sum(dim=1) / lengths).double(), "first").score


def _net(inputs: int, classes: int, chosen: random.Random) -> nn.Sequential:
    activation, initializer = chosen.choice(ACTIVATIONS), chosen.choice(INITIALIZERS)
    layers: list[nn.Module] = []
    for units in chosen.choice(WIDTHS):
        layers += [nn.Linear(inputs, units), activation()]
        inputs = units
    net = nn.Sequential(*layers, nn.Linear(inputs, classes))
    for layer in net:
        if isinstance(layer, nn.Linear) and initializer is not None:
            initializer(layer.weight)
            nn.init.zeros_(layer.bias)
    if chosen.random() < 0.3:
        nn.init.zeros_(net[-1].weight)
    return net


def _same(weight: Tensor) -> Tensor:
    return weight


def _pruned(weight: Tensor) -> Tensor:
    limit = weight.abs().flatten().kthvalue(int(0.8 * weight.numel())).values
    return torch.where(weight.abs() > limit, weight, 0.0)


def _rounded(weight: Tensor) -> Tensor:
    step = weight.abs().max().clamp_min(1e-12) / 127
    return (weight / step).round() * step


if __name__ == "__main__":
    main()
