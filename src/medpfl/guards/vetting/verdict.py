"""The verdict on a model before training: all checks, what they found, and what nobody can see from here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from medpfl.core.domain import GlobalModel, Tensors
from medpfl.core.errors import ModelError
from medpfl.core.memory import machine_memory
from medpfl.guards.vetting.base import CHECKS, Check, Evidence, Result
from medpfl.guards.vetting.layers import layers_of

Verdict = Literal["passed", "leaks", "crafted"]

BYTES_PER_ENTRY = 4
"""A view of one stored number may claim any number of entries, which must not be found out by running out of memory."""

NOT_COVERED = (
    "the training code: what computes loss and update may send anything; run only code that you reviewed or that is signed",
    "the recipe: optimizer, learning rate, local steps, batch size and precision; pin your own, take none from the server",
    "the aggregation: clipping range, quantization, weights, number of clients and threshold; pin them as well",
    "whether all clients got the same model: compare digests over a channel that the server does not control",
    "attacks on honest models, such as gradient matching: audit them with `medpfl audit`",
    "attacks that are trained into the weights (SEER) and those that know these checks; look at the update before sending",
)
"""What vetting does not look at, with what to do about it."""


@dataclass(frozen=True)
class Vetting:
    """What was found about a model before any training on it.

    verdict: `crafted` if a check found what honest training does not make, else `leaks` if one found that updates give
    single images away, else `passed`. behavior_checked: whether the model was run; else its verdict rests on tensors
    alone, which a careful attacker disguises. not_covered: what no check looks at.
    """

    verdict: Verdict
    results: tuple[Result, ...]
    behavior_checked: bool
    not_covered: tuple[str, ...] = NOT_COVERED

    @property
    def passed(self) -> bool:
        """Whether nothing was found."""
        return self.verdict == "passed"

    @property
    def reasons(self) -> tuple[str, ...]:
        """A sentence per check that found something, those that mean `crafted` first."""
        found = [result for result in self.results if result.status == "found"]
        return tuple(
            f"{f'{result.where}: ' if result.where else ''}{result.sentence}"
            for result in sorted(found, key=lambda result: result.means)
        )


def vet(model: GlobalModel | Tensors, reference: GlobalModel | Tensors | None = None) -> Vetting:
    """Looks at a model that came from a server, before training on it.

    model: a model, or its tensors by name. reference: one that was trusted, such as that of the round before.
    Raises `ModelError` if there are no tensors, or some hold numbers that are not finite.
    """
    tensors = tensors_of(model)
    check_tensors(tensors, "the model")
    earlier = None if reference is None else tensors_of(reference)
    if earlier is not None:
        check_tensors(earlier, "the reference")
    evidence = Evidence(tensors, layers_of(tensors), earlier)
    results = tuple(_result(entry.name, entry.item, evidence) for entry in CHECKS)
    return Vetting(_verdict(results), results, behavior_checked=False)


def tensors_of(model: GlobalModel | Tensors) -> Tensors:
    """All tensors of a model: trained ones, then buffers, counters and frozen ones."""
    if not isinstance(model, GlobalModel):
        return model
    return {**model.parameters, **model.buffers, **model.counters, **model.constants}


def check_tensors(tensors: Tensors, what: str) -> None:
    """Raises `ModelError` that names `what` if it has no weights, or numbers that are not finite."""
    if not any(tensor.is_floating_point() and tensor.numel() for tensor in tensors.values()):
        raise ModelError(f"{what} has no weights: expected a state dict of floating-point tensors with their names")
    entries, there = sum(tensor.numel() for tensor in tensors.values()), machine_memory()
    if BYTES_PER_ENTRY * entries > there:
        raise ModelError(
            f"{what} has {entries} entries, for which this machine's {there / 2**30:.1f} GiB of memory are too few: "
            "look at it on a larger one"
        )
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise ModelError(
                f"{what}: '{name}' holds numbers that are not finite: do not train on it, ask for an intact one"
            )


def _result(name: str, check: Check, evidence: Evidence) -> Result:
    def unseen(why: str) -> Result:
        return Result(name, check.about, check.means, "not checked", float("nan"), check.threshold, "", why)

    if check.about == "reference" and evidence.reference is None:
        return unseen("no reference was given")
    measured = check.measure(evidence)
    if measured is None:
        return unseen("the model has no layer that this applies to")
    status: Literal["clear", "found"] = "found" if measured.score > check.threshold else "clear"
    return Result(
        name, check.about, check.means, status, measured.score, check.threshold, measured.where, measured.seen
    )


def _verdict(results: tuple[Result, ...]) -> Verdict:
    found = {result.means for result in results if result.status == "found"}
    meanings: Iterator[Verdict] = (meaning for meaning in ("crafted", "leaks") if meaning in found)
    return next(meanings, "passed")
