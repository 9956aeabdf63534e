"""What it costs an attacker to get past vetting: recovery against detection, disguise by disguise.

    python benchmarks/vetting_evasion.py --seeds 5 --out docs/benchmarks/vetting_evasion.csv
    python benchmarks/vetting_evasion.py --medmnist pneumoniamnist.npz --seeds 5

The attacker knows every check. Its module (bins on a random positive query, units permuted, rows scaled by random
factors, columns of rank 1 with random signs and sizes) stands in front of a small convolutional net, or hides. It reads
one exact gradient of the mean loss in float64, knowing its own factors: neighboring bins after division by them. Per
row: the share of the private images above 30 dB (any candidate, so an upper bound), and the share of seeds in which
vetting says `crafted` from tensors alone, on drawn images, on 16 of the client's own other images (with the checks that
found something there; `leaks` too), and where the client knows which net was agreed on.
"""

from __future__ import annotations

import argparse
import csv
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from medpfl.core.functional import psnr
from medpfl.core.tasks import SingleLabel
from medpfl.data import load_dataset
from medpfl.data.base import Reader
from medpfl.data.readers.medmnist import MedMnistReader
from medpfl.data.readers.phantom import PhantomReader
from medpfl.guards.vetting import Vetting, vet
from medpfl.guards.vetting.verdict import tensors_of
from medpfl.models import prepare

SIDE = 28
INPUTS = SIDE * SIDE
BORDER = 4
CLASSES = 2


@dataclass(frozen=True)
class Disguise:
    """How the module hides.

    noise: of every row, as a share of its length, and of every column. border: random weights so many times as long as
    the row where images are made black. honest: share of units that are drawn as PyTorch does. back: length of their
    columns in the second layer, in units of the bins' median column. behind: whether a random convolution with ReLU
    stands in front, whose outputs the bins then sort. mixed: whether the trained rows are a random rotation of all of
    these, which a frozen layer undoes before the gates.
    """

    name: str
    noise: float = 0.0
    border: float = 0.0
    honest: float = 0.0
    back: float = 0.1
    behind: bool = False
    mixed: bool = False


DISGUISES = (
    Disguise("in front: permuted, scaled, rank 1"),
    Disguise("in front: noise of 3 in a black border", border=3.0),
    Disguise("behind a convolution", behind=True),
    *(Disguise(f"behind: noise of {noise:g}", noise=noise, behind=True) for noise in (0.05, 0.1, 0.2, 0.4, 0.8)),
    *(Disguise(f"behind: {share:.0%} honest units", honest=share, behind=True) for share in (0.5, 0.9, 0.98)),
    Disguise("behind: noise of 0.1, 90% honest units", noise=0.1, honest=0.9, behind=True),
    Disguise(
        "behind: noise of 0.1, 90% honest units with columns as long", noise=0.1, honest=0.9, back=1.0, behind=True
    ),
    Disguise("in front: 50% honest units, rows mixed", honest=0.5, back=1.0, mixed=True),
    Disguise("behind: 50% honest units, rows mixed", honest=0.5, back=1.0, behind=True, mixed=True),
    Disguise(
        "behind: noise of 0.1, 50% honest units, rows mixed", noise=0.1, honest=0.5, back=1.0, behind=True, mixed=True
    ),
)


class Module(nn.Module):
    """The crafted net, and what the attacker knows about it: edges and factors of the bins."""

    def __init__(self, images: Tensor, bins: int, how: Disguise, generator: torch.Generator) -> None:
        super().__init__()
        self.front = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU()) if how.behind else nn.Identity()
        with torch.no_grad():
            seen = self.front(images).flatten(1)
        inputs = seen.shape[1]
        query = torch.rand(inputs, generator=generator) / inputs
        inside = torch.ones(SIDE, SIDE, dtype=torch.bool)
        if how.border:
            inside[:BORDER] = inside[-BORDER:] = inside[:, :BORDER] = inside[:, -BORDER:] = False
            query = query * inside.flatten()
        edges = torch.quantile(seen @ query, torch.linspace(0.001, 0.999, bins))
        rows, biases = query.repeat(bins, 1), -edges
        lengths = query.norm()
        rows = rows + how.noise * lengths * torch.randn(rows.shape, generator=generator) / inputs**0.5
        if how.border:
            outside = (~inside.flatten()).float()
            rows = (
                rows
                + how.border * lengths * outside * torch.randn(rows.shape, generator=generator) / outside.sum() ** 0.5
            )
        sizes = torch.exp(torch.randn(bins, generator=generator))
        columns = torch.randn(INPUTS, 1, generator=generator)
        factors = 10 * torch.randn(bins, generator=generator) / bins / lengths
        second = columns / columns.norm() * (factors / sizes)
        second = second + how.noise * second.norm(dim=0) * torch.randn(second.shape, generator=generator) / INPUTS**0.5
        extra = int(bins * how.honest / (1 - how.honest)) if how.honest else 0
        plain, back = nn.Linear(inputs, max(1, extra)), nn.Linear(max(1, extra), INPUTS, bias=False)
        with torch.no_grad():
            back.weight.mul_(how.back * second.norm(dim=0).median() / back.weight.norm(dim=0).mean())
        order = torch.randperm(bins + extra, generator=generator)
        self.first, self.second = nn.Linear(inputs, bins + extra), nn.Linear(bins + extra, INPUTS)
        with torch.no_grad():
            self.first.weight.copy_(torch.cat([rows * sizes[:, None], plain.weight[:extra]])[order])
            self.first.bias.copy_(torch.cat([biases * sizes, plain.bias[:extra]])[order])
            self.second.weight.copy_(torch.cat([second, back.weight[:, :extra]], dim=1)[:, order])
            self.second.bias.fill_(0.4)
        self.mixed: nn.Module = nn.Identity()
        if how.mixed:
            self._mix(generator)
        self.body = nn.Sequential(
            nn.Conv2d(1, 16, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Conv2d(16, 32, 5, stride=2, padding=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 49, CLASSES),
        )
        self.places = order.argsort()[:bins]
        self.factors = factors / sizes

    def _mix(self, generator: torch.Generator) -> None:
        units = self.first.out_features
        rotation = torch.linalg.qr(torch.randn(units, units, generator=generator, dtype=torch.float64)).Q
        self.mixed = nn.Linear(units, units, bias=False).requires_grad_(False)
        with torch.no_grad():
            self.mixed.weight.copy_(rotation)
            self.first.weight.copy_(rotation.T @ self.first.weight.double())
            self.first.bias.copy_(rotation.T @ self.first.bias.double())

    def forward(self, images: Tensor) -> Tensor:
        """Class scores."""
        hidden = torch.relu(self.mixed(self.first(self.front(images).flatten(1))))
        output: Tensor = self.body(self.second(hidden).reshape(-1, 1, SIDE, SIDE))
        return output

    def read(self, images: Tensor, labels: Tensor) -> Tensor:
        """What the attacker reads from the gradient of the mean loss: one candidate per bin, (bins, inputs)."""
        loss = nn.functional.cross_entropy(self(images), labels)
        weight, bias = torch.autograd.grad(loss, [self.first.weight, self.first.bias])
        weight, bias = self.mixed(weight.T).T, self.mixed(bias)
        weight, bias = weight[self.places] / self.factors[:, None], bias[self.places] / self.factors
        steps, sizes = weight[:-1] - weight[1:], bias[:-1] - bias[1:]
        return steps / torch.where(sizes == 0, torch.inf, sizes)[:, None]


def main() -> None:
    """Measures every disguise and prints a row each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="models per disguise (5)")
    parser.add_argument("--bins", type=int, default=256, help="bins of the module (256)")
    parser.add_argument("--images", type=int, default=32, help="private images of the attacked client (32)")
    parser.add_argument("--medmnist", type=Path, help="a MedMNIST file with gray 28x28 images; default: drawn films")
    parser.add_argument("--only", default="", help="only disguises whose name holds this text")
    parser.add_argument("--out", type=Path, help="CSV file to write beside the printed rows")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    films: Reader = PhantomReader(kind="chest", count=600, seed=11)
    if chosen.medmnist is not None:
        films = MedMnistReader(path=chosen.medmnist)
    images = load_dataset(films, name="films", size=SIDE, channels=1, maximum=600).images
    rows: list[dict[str, object]] = []
    for how in (known for known in DISGUISES if chosen.only in known.name):
        found = [measured(how, images, chosen.bins, chosen.images, seed) for seed in range(chosen.seeds)]
        mean = {name: sum(one[0][name] for one in found) / len(found) for name in found[0][0]}
        names = sorted({name for one in found for name in one[1]})
        rows.append({"disguise": how.name, **{name: f"{value:.2f}" for name, value in mean.items()}})
        rows[-1]["checks"] = " ".join(names)
        print(", ".join(f"{name}: {value}" for name, value in rows[-1].items()), flush=True)
    if chosen.out is not None:
        with chosen.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


def measured(how: Disguise, images: Tensor, bins: int, count: int, seed: int) -> tuple[dict[str, float], list[str]]:
    """Recovery and verdicts of one model, and which checks found something on the client's own images."""
    generator = torch.Generator().manual_seed(seed)
    images = images[torch.randperm(len(images), generator=generator)]
    if how.border:
        kept = torch.zeros_like(images)
        middle = slice(BORDER, SIDE - BORDER)
        kept[:, :, middle, middle] = images[:, :, middle, middle]
        images = kept
    private, own, auxiliary = images[:count], images[count : count + 16], images[count + 16 :]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Module(auxiliary, bins, how, generator)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    read = net.double().read(private.double(), labels)
    with torch.no_grad():
        sought = net.front(private.double()).flatten(1)
    recovered = [bool((quality(read, one) > 30).any()) for one in sought]
    model = prepare(net.float(), name="crafted", image_shape=(1, SIDE, SIDE), task=SingleLabel(CLASSES))
    on_own = vet(model, images=own)
    agreed = prepare(net.body, name="agreed", image_shape=(1, SIDE, SIDE), task=SingleLabel(CLASSES))
    shares = {
        "recovered": sum(recovered) / count,
        "tensors": crafted(vet(tensors_of(model))),
        "drawn": crafted(vet(model)),
        "own": crafted(on_own),
        "own_leaks": float(on_own.verdict == "leaks"),
        "agreed": crafted(vet(tensors_of(model), agreed=agreed)),
    }
    return shares, [result.check for result in on_own.results if result.status == "found"]


def crafted(vetting: Vetting) -> float:
    """1 if vetting says so."""
    return float(vetting.verdict == "crafted")


def quality(read: Tensor, one: Tensor) -> Tensor:
    """PSNR of all candidates (M, inputs) with one input, whose own range counts as 1."""
    top = one.max().clamp_min(1e-12)
    return psnr((read / top)[:, None, None], (one / top).expand(len(read), -1)[:, None, None])


if __name__ == "__main__":
    main()
