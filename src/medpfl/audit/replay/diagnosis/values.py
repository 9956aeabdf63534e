"""What the numbers of an update show: their size, zeros, precision, grids and bounds."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from medpfl.audit.replay.diagnosis.subject import Fact, Subject, plural, share
from medpfl.federation.changes import norm

SPARSE = 0.5
"""Share of entries without any change from which an update counts as sparse."""

SAME_NORM = 1e-4
"""Relative difference below which two clients' updates count as equally long."""

SAME_STEP = 0.01
"""Relative difference below which two entries count as moved equally far."""

MANY = 64
"""A tensor of fewer entries is not searched for a grid."""

MOST_SEARCHED = 4096
"""Entries of a tensor that a grid is searched in."""

COUNTS = 0.01
"""Share of the update's squared norm from which an error stands in the way of an attack."""


def size(subject: Subject) -> Iterator[Fact]:
    """How long the update is."""
    if not math.isfinite(subject.size):
        yield Fact("size", "The update holds numbers that are not finite.", None, "hinders")
        return
    own = norm(subject.model.parameters)
    kind = "gradient" if subject.observation.update.kind == "gradient" else "change of the model"
    largest = max(subject.change, key=lambda name: float(subject.change[name].norm()))
    part = float(subject.change[largest].square().sum()) / max(subject.size**2, 1e-300)
    yield Fact(
        "size",
        f"The {kind} has norm {subject.size:.4g} (the model's own norm is {own:.4g}); {share(part)} of its square lies in "
        f"'{largest}'.",
        subject.size,
    )


def zeros(subject: Subject) -> Iterator[Fact]:
    """Entries that did not change at all."""
    zero = sum(int((tensor == 0).sum()) for tensor in subject.change.values())
    part = zero / subject.entries
    if part == 1.0:
        yield Fact("zeros", "Nothing changed: every entry of the update is zero.", 1.0, "hinders")
    elif part >= SPARSE:
        yield Fact(
            "zeros",
            f"{share(part)} of {plural(subject.entries, 'trainable entry')} did not change at all: sparsification, a grid too "
            "coarse for small changes, or units that are dead.",
            part,
            "hinders",
        )
    elif zero:
        yield Fact(
            "zeros", f"{share(part)} of {plural(subject.entries, 'trainable entry')} did not change at all.", part
        )


def precision(subject: Subject) -> Iterator[Fact]:
    """Whether all numbers fit into fewer bits than float32 has."""
    floats = [tensor for tensor in subject.raw.values() if tensor.is_floating_point()]
    whole = [tensor for tensor in subject.raw.values() if not tensor.is_floating_point()]
    if whole:
        name = str(whole[0].dtype).removeprefix("torch.")
        yield Fact("precision", f"{plural(len(whole), 'trainable tensor')} came as integers ({name}).", None, "hinders")
    if not floats:
        return
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(tensor.to(dtype).to(tensor.dtype), tensor) for tensor in floats):
            name = str(dtype).removeprefix("torch.")
            error = _rounding_share(subject, dtype)
            yield Fact(
                "precision",
                f"All numbers fit into {name}: rounding to it makes up about {share(min(1.0, error))} of the update's "
                "squared norm.",
                error,
                "hinders" if error >= COUNTS else "neutral",
            )
            return


def _rounding_share(subject: Subject, dtype: torch.dtype) -> float:
    """Expected squared error of rounding to the type, over the squared norm of the change."""
    square = sum(float(tensor.double().square().sum()) for tensor in subject.raw.values() if tensor.is_floating_point())
    relative = torch.finfo(dtype).eps ** 2 / 24  # steps between eps / 2 and eps of the value, uniform within
    return relative * square / max(subject.size**2, 1e-300)


def grid(subject: Subject) -> Iterator[Fact]:
    """Whether entries lie on evenly spaced levels, as quantization leaves them."""
    found: dict[str, tuple[float, int]] = {}
    searched = 0
    for name, tensor in subject.raw.items():
        if tensor.numel() >= MANY and tensor.is_floating_point():
            searched += 1
            levels = grid_of(tensor)
            if levels is not None:
                found[name] = levels
    if not found:
        return
    clients = subject.observation.clients  # each on levels so many times as far apart, and their mean on these
    error = clients * sum(step**2 / 12 * subject.raw[name].numel() for name, (step, _) in found.items())
    part = error / max(subject.size**2, 1e-300)
    steps = sorted(step for step, _ in found.values())
    fewest = min(levels for _, levels in found.values())
    spacing = f"{steps[0]:.3g}" if steps[-1] <= 1.01 * steps[0] else f"{steps[0]:.3g} to {steps[-1]:.3g}"
    error_of = "rounding to them makes up"
    if clients > 1:
        error_of = f"if each of {clients} clients rounded to levels {clients} times as far apart, that makes up"
    yield Fact(
        "grid",
        f"The entries of {len(found)} of {plural(searched, 'large tensor')} lie on evenly spaced levels ({spacing} apart; at "
        f"least {plural(fewest, 'different value')} in use), as quantization leaves them; {error_of} about "
        f"{share(min(1.0, part))} of the update's squared norm.",
        part,
        "hinders" if part >= COUNTS else "neutral",
    )


def grid_of(tensor: Tensor) -> tuple[float, int] | None:
    """Distance of the levels and number of different ones, None where the values are on no grid.

    >>> grid_of(torch.randint(0, 16, (500,), generator=torch.Generator().manual_seed(0)) * 0.25 - 1.0)
    (0.25, 16)
    >>> grid_of(torch.rand(500, generator=torch.Generator().manual_seed(0))) is None
    True
    """
    values = torch.unique(tensor.detach().flatten()[:MOST_SEARCHED].double())
    if len(values) < 2:
        return None
    tolerance = 4 * torch.finfo(tensor.dtype).eps * float(values.abs().max())
    gaps = values.diff()
    gaps = gaps[gaps > tolerance]
    if len(gaps) < 1:
        return None
    step = float(gaps.min())
    if step < 50 * tolerance:
        return None
    for _ in range(3):  # the smallest gap carries its own rounding, which whole multiples average out
        counts = (gaps / step).round()
        step = float(gaps.sum() / counts.sum())
    off = (gaps / step - (gaps / step).round()).abs()
    if float(off.max()) > max(0.02, 2 * tolerance / step):
        return None
    levels = int(torch.unique(((values - values[0]) / step).round()).numel())
    if levels < 3 or (levels > 0.9 * min(tensor.numel(), MOST_SEARCHED) and len(gaps) < 8):
        return None
    return step, levels


def bound(subject: Subject) -> Iterator[Fact]:
    """Whether several clients' updates have the same norm, and none a larger one."""
    if len(subject.norms) < 2:
        return
    largest = max(subject.norms.values())
    if not math.isfinite(largest) or largest == 0:
        return
    same = sum(value >= (1 - SAME_NORM) * largest for value in subject.norms.values())
    own = subject.size >= (1 - SAME_NORM) * largest
    if same >= 2:
        yield Fact(
            "bound",
            f"{same} of the round's {len(subject.norms)} updates have the same norm of {largest:.4g} (within "
            f"{share(SAME_NORM)}), and none is longer: they were clipped to it{'' if own else ', this one is shorter'}.",
            largest,
            "neutral",
        )


def equal_steps(subject: Subject) -> Iterator[Fact]:
    """Whether most entries moved equally far, as signs or the first step of Adam leave them."""
    moved = torch.cat([tensor.flatten().abs() for tensor in subject.change.values()])
    moved = moved[moved > 0]
    if len(moved) < MANY:
        return
    middle = float(moved.median())
    part = float(((moved / middle - 1).abs() <= SAME_STEP).double().mean())
    if part >= SPARSE:
        yield Fact(
            "equal_steps",
            f"{share(part)} of the entries that moved did so by the same {middle:.3g} (within {share(SAME_STEP)}): signs, or "
            "the first step of Adam, which hide how large the gradient is.",
            part,
            "hinders",
        )
