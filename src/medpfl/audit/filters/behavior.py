"""What a filter makes of one update: is it applied, how much is left, what else does it touch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from medpfl.audit.filters.samples import Sample, sample_update
from medpfl.audit.filters.subject import Call, Subject, call
from medpfl.core.domain import Tensors

ROUNDS = 30
"""How often in a row a filter is called to see whether it stays in force."""


@dataclass(frozen=True)
class Behavior:
    """What became of one update. All shares are of trainable entries, 0 to 1.

    changed: differ from the update. cosine: with the clean update. norm_ratio: of the norms after and before. left:
    not zero afterwards, of those that were not before. buffers, counters: names of tensors that differ, bare_buffers: of those that are sent as they are. missing, added,
    reshaped, recast, not_finite: names of tensors that were left out, came in addition, have another shape or dtype, or
    hold NaN or infinity. last_changed: share that differs in call number `ROUNDS`. dtypes: what happens to the same update
    in another dtype. error: what the filter raised, if it did.
    """

    changed: float = 0.0
    cosine: float = 0.0
    norm_ratio: float = 0.0
    left: float = 0.0
    buffers: tuple[str, ...] = ()
    bare_buffers: tuple[str, ...] = ()
    counters: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    added: tuple[str, ...] = ()
    reshaped: tuple[str, ...] = ()
    recast: tuple[str, ...] = ()
    not_finite: tuple[str, ...] = ()
    last_changed: float = 0.0
    in_place: bool = False
    dtypes: tuple[tuple[str, str], ...] = ()
    error: str = ""

    @property
    def applied(self) -> bool:
        """Whether the filter changed anything that an attack could read."""
        return self.changed > 0 or any(name in self.missing for name in sample_update().trainable)


def suited(subject: Subject) -> Subject:
    """The same filter, called with NumPy arrays where it fails on tensors and takes arrays."""
    tensors = sample_update().tensors
    fails = [bool(call(subject.made(), tensors, arrays=arrays).error) for arrays in ("torch", "numpy")]
    return replace(subject, arrays="numpy") if fails == [True, False] else subject


def behavior(subject: Subject) -> Behavior:
    """Calls a fresh filter on the sample update, in a row and in other dtypes."""
    sample = sample_update()
    made = subject.made()
    first = call(made, sample.tensors, arrays=subject.arrays)
    if first.error:
        return Behavior(error=first.error)
    last = first
    for _ in range(ROUNDS - 1):
        last = call(made, sample.tensors, arrays=subject.arrays)
        if last.error:
            break
    sent = first.sent
    known = sample.tensors
    same = {name: tensor for name, tensor in sent.items() if name in known and tensor.shape == known[name].shape}
    before = joined(sample.trainable)
    after = joined({name: same.get(name, torch.zeros_like(tensor)) for name, tensor in sample.trainable.items()})
    norms = before.norm(), after.norm()
    return Behavior(
        changed=share_changed(sample, first),
        cosine=float(before @ after / (norms[0] * norms[1])) if norms[1] > 0 else 0.0,
        norm_ratio=float(norms[1] / norms[0]),
        left=float(((after != 0) & (before != 0)).sum() / (before != 0).sum()),
        buffers=(touched := _touched(sample.buffers, same)),
        bare_buffers=tuple(name for name in sample.buffers if name in sent and name not in touched),
        counters=_touched(sample.counters, same),
        missing=tuple(name for name in known if name not in sent),
        added=tuple(name for name in sent if name not in known),
        reshaped=tuple(name for name in sent if name in known and name not in same),
        recast=tuple(name for name, tensor in same.items() if tensor.dtype != known[name].dtype),
        not_finite=tuple(name for name, tensor in sent.items() if not bool(torch.isfinite(tensor.double()).all())),
        last_changed=0.0 if last.error else share_changed(sample, last),
        in_place=first.in_place,
        dtypes=tuple(_in_dtypes(subject, sample)),
        error=f"in call {ROUNDS} or before: {last.error}" if last.error else "",
    )


def joined(tensors: Tensors) -> Tensor:
    """All entries in one float64 vector."""
    return torch.cat([tensor.reshape(-1).double() for tensor in tensors.values()])


def share_changed(sample: Sample, found: Call) -> float:
    """Share of trainable entries that a call changed or left out."""
    differ = total = 0
    for name, tensor in sample.trainable.items():
        other = found.sent.get(name)
        total += tensor.numel()
        comparable = other is not None and other.shape == tensor.shape
        differ += int((other.double() != tensor.double()).sum()) if comparable and other is not None else tensor.numel()
    return differ / total


def _touched(tensors: Tensors, sent: Tensors) -> tuple[str, ...]:
    return tuple(
        name
        for name, tensor in tensors.items()
        if name in sent and not torch.equal(sent[name].double(), tensor.double())
    )


def _in_dtypes(subject: Subject, sample: Sample) -> list[tuple[str, str]]:
    """What becomes of the update in other dtypes: applied, unchanged, or what was raised."""
    largest = float(joined(sample.trainable).abs().max())
    cast = {
        dtype: sample.mapped(partial(Tensor.to, dtype=dtype))
        for dtype in (torch.float64, torch.float16, torch.bfloat16)
    }
    cast[torch.int8] = sample.mapped(lambda tensor: (tensor / largest * 127).clamp(-127, 127).to(torch.int8))
    if subject.arrays == "numpy":
        del cast[torch.bfloat16]
    found = []
    for dtype, given in cast.items():
        result = call(subject.made(), given.tensors, arrays=subject.arrays)
        said = f"raises {result.error}" if result.error else "applied" if share_changed(given, result) else "unchanged"
        found.append((str(dtype).removeprefix("torch."), said))
    return found
