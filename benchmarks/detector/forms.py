"""What attackers who know every check send: brightness bins in disguise, as settings of one front."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Form:
    """What the front looks like.

    units: bins, over all queries. scale, gain: as MedLeak's. shuffled: units permuted, rows of random sizes, columns of
    random signs and sizes. noise: added to each row and column, as a share of its length. quiet: added to rows only, in
    directions in which the server's own images hardly differ. covered: share of the images around the median
    brightness that the bins cover. honest: units beside the bins that are drawn as PyTorch does. patch: side of the
    patches that a random orthogonal convolution mixes before. dense: a random orthogonal dense layer before. soft:
    width of the gates in bins (softplus), 0 for ReLU. queries: how many share the units. clean: the image itself is
    added to the output. pooled: a frozen random layer and the mean of its outputs, added to the image, in place of
    equal columns. mixed: the trained layer holds random mixtures of all units' rows, which a frozen layer behind undoes.
    """

    units: int = 256
    scale: float = 1e-3
    gain: float = 10.0
    shuffled: bool = True
    noise: float = 0.0
    quiet: float = 0.0
    covered: float = 1.0
    honest: int = 0
    patch: int = 0
    dense: bool = False
    soft: float = 0.0
    queries: int = 1
    clean: bool = False
    pooled: bool = False
    mixed: bool = False


@dataclass(frozen=True, kw_only=True)
class OwnRows:
    """Traps in the first layer of a net that is dense first anyway.

    share: of the units that are traps; the others stay as they were. shifted: rows are normal around a negative mean,
    in place of thresholds. trained: the net is trained first, and its own rows get thresholds.
    """

    share: float = 1.0
    shifted: bool = False
    trained: bool = False


@dataclass(frozen=True)
class Trick:
    """A way to hide, from weak to strong: what its strengths mean, and the front, or the own rows, of each."""

    strengths: Sequence[float]
    meaning: str
    form: Callable[[float], Form | OwnRows]


DISGUISED = Form()
POOLED = Form(pooled=True, scale=0.1)
MIXED_ROWS = replace(POOLED, shuffled=False, mixed=True)

TRICKS: dict[str, Trick] = {
    "plain": Trick((1,), "MedLeak's module as it is", lambda _: Form(shuffled=False)),
    "disguised": Trick((1,), "permuted, rescaled, rank-1 columns", lambda _: DISGUISED),
    "noisy_rows": Trick(
        (0.01, 0.03, 0.1, 0.3, 1), "noise over row and column", lambda noise: replace(DISGUISED, noise=noise)
    ),
    "quiet_noise": Trick(
        (0.1, 0.3, 1, 3, 10),
        "noise over row where images do not differ, pooled columns",
        lambda quiet: replace(POOLED, quiet=quiet),
    ),
    "among_honest_units": Trick(
        (0.5, 0.25, 0.12, 0.06, 0.03),
        "share of bins in 512 units",
        lambda share: replace(DISGUISED, units=round(512 * share), honest=round(512 * (1 - share))),
    ),
    "few_images": Trick(
        (0.5, 0.2, 0.1, 0.05), "share of images covered", lambda share: replace(DISGUISED, covered=share)
    ),
    "large_scale": Trick((1e-2, 0.1, 1, 10, 100), "scale of rows", lambda scale: replace(DISGUISED, scale=scale)),
    "clean_path": Trick(
        (1, 0.1, 0.01, 1e-3), "gain beside the image", lambda gain: replace(DISGUISED, clean=True, gain=gain)
    ),
    "behind_a_convolution": Trick((2, 4), "patches mixed at random", lambda side: replace(DISGUISED, patch=int(side))),
    "split_layer": Trick((1,), "orthogonal dense layer before", lambda _: replace(DISGUISED, dense=True)),
    "soft_gates": Trick((0.1, 0.5, 2, 8), "width of gates in bins", lambda width: replace(DISGUISED, soft=width)),
    "several_queries": Trick(
        (4, 16, 64), "queries that share the units", lambda count: replace(DISGUISED, queries=int(count))
    ),
    "combined": Trick(
        (256, 128, 64, 32),
        "bins among 512 units: quiet noise of 3, pooled columns, behind a convolution",
        lambda units: replace(POOLED, quiet=3.0, patch=4, units=int(units), honest=512 - int(units)),
    ),
    "mixed_rows": Trick(
        (512, 256, 128, 64, 32),
        "bins among 512 units whose rows a frozen layer unmixes",
        lambda units: replace(MIXED_ROWS, units=int(units), honest=512 - int(units)),
    ),
    "mixed_and_quiet": Trick(
        (256, 128, 64, 32),
        "the same with quiet noise of 3",
        lambda units: replace(MIXED_ROWS, quiet=3.0, units=int(units), honest=512 - int(units)),
    ),
    "own_traps": Trick(
        (1, 0.5, 0.25, 0),
        "traps by thresholds in a dense net's own layer: share of its units (0: honest)",
        lambda share: OwnRows(share=share),
    ),
    "own_shifted": Trick(
        (1, 0.5, 0.25), "the same by shifted rows: share of units", lambda share: OwnRows(share=share, shifted=True)
    ),
    "own_trained": Trick(
        (1, 0.5, 0.25, 0),
        "thresholds for the rows of a trained net: share of units (0: honest)",
        lambda share: OwnRows(share=share, trained=True),
    ),
}
