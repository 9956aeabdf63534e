"""The verdict on a model before training: all checks, what they found, and what nobody can see from here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from medpfl.core.domain import GlobalModel, Tensors
from medpfl.core.errors import ModelError
from medpfl.core.functional import is_finite
from medpfl.core.memory import machine_memory
from medpfl.guards.vetting.base import CHECKS, Check, Evidence, Result
from medpfl.guards.vetting.images import drawn_images
from medpfl.guards.vetting.layers import layers_of
from medpfl.guards.vetting.watch import MOST_IMAGES, watch
from medpfl.models.state import apply_state

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
    single images away, else `passed`. behavior: what the model was run on, or why it was not; without, the verdict
    rests on tensors alone, which a careful attacker disguises. not_covered: what no check looks at.
    """

    verdict: Verdict
    results: tuple[Result, ...]
    behavior_checked: bool
    behavior: str
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


def vet(
    model: GlobalModel | Tensors,
    reference: GlobalModel | Tensors | None = None,
    images: Tensor | None = None,
    *,
    agreed: GlobalModel | None = None,
) -> Vetting:
    """Looks at a model that came from a server, before training on it.

    model: a model, or its tensors by name. reference: one that was trusted, such as that of the round before. images:
    some of the client's own (N, *image_shape) in [0, 1], 16 are enough; drawn ones if None. agreed: the client's own
    build of the model, into which the tensors of what came are loaded; without it tensors alone cannot be run, so
    behavior is not checked.

    Raises `ModelError` if there are no tensors, some hold numbers that are not finite, or the model cannot run on the
    images.

    >>> net = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 2))
    >>> found = vet(net.state_dict())
    >>> found.verdict, found.behavior_checked
    ('leaks', False)
    """
    tensors = tensors_of(model)
    check_tensors(tensors, "the model")
    earlier = None if reference is None else tensors_of(reference)
    if earlier is not None:
        check_tensors(earlier, "the reference")
    built, misfit = model if isinstance(model, GlobalModel) else None, None
    if agreed is not None:
        built, misfit = _fitted(agreed, tensors)
    watched = None
    behavior = "the tensors do not fit the agreed model" if misfit else "no model was given that could be run"
    if built is not None:
        shown = drawn_images(built.image_shape, MOST_IMAGES) if images is None else _checked(images, built)
        watched = watch(built, shown)
        kind = "drawn images" if images is None else "given images"
        behavior = f"one simulated client step on {len(watched.batch)} {kind} of shape {tuple(built.image_shape)}"
    evidence = Evidence(tensors, layers_of(tensors), earlier, misfit, watched)
    results = tuple(_result(entry.name, entry.item, evidence) for entry in CHECKS)
    unseen = {} if watched is None else watched.not_seen
    return Vetting(_verdict(results), results, watched is not None, behavior, (*_unseen_weights(unseen), *NOT_COVERED))


def _fitted(agreed: GlobalModel, tensors: Tensors) -> tuple[GlobalModel | None, str]:
    """The agreed model with these tensors, or None and why they do not fit."""
    try:
        return apply_state(agreed, tensors, "what was received"), ""
    except ModelError as error:
        return None, str(error)


def _checked(images: Tensor, model: GlobalModel) -> Tensor:
    if tuple(images.shape[1:]) != tuple(model.image_shape) or not len(images):
        raise ModelError(
            f"images to vet with have shape {tuple(images.shape)}, expected (N, {', '.join(map(str, model.image_shape))})"
        )
    return images


def _unseen_weights(unseen: Mapping[str, str]) -> tuple[str, ...]:
    if not unseen:
        return ()
    name, reason = next(iter(unseen.items()))
    return (f"{len(unseen)} weights at work, such as '{name}': {reason}",)


def tensors_of(model: GlobalModel | Tensors) -> Tensors:
    """All tensors of a model, in the order of its layers, frozen ones included."""
    if not isinstance(model, GlobalModel):
        return model
    everything = {**model.parameters, **model.buffers, **model.counters, **model.constants}
    order = [name for name in model.module.state_dict(keep_vars=True) if name in everything]
    return {name: everything[name] for name in dict.fromkeys([*order, *everything])}


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
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise ModelError(f"{what}: '{name}' is sparse or quantized: expected dense tensors")
        if tensor.is_floating_point() and not is_finite(tensor.float()):
            raise ModelError(
                f"{what}: '{name}' holds numbers that are not finite: do not train on it, ask for an intact one"
            )


def _result(name: str, check: Check, evidence: Evidence) -> Result:
    def unseen(why: str) -> Result:
        return Result(name, check.about, check.means, "not checked", float("nan"), check.threshold, "", why)

    measured = check.measure(evidence)
    if measured is None:
        return unseen(_why_not_checked(name, check, evidence))
    clear = measured.score <= check.threshold  # a score that cannot be computed is not clear
    status: Literal["clear", "found"] = "clear" if clear else "found"
    return Result(
        name, check.about, check.means, status, measured.score, check.threshold, measured.where, measured.seen
    )


def _why_not_checked(name: str, check: Check, evidence: Evidence) -> str:
    if check.about == "behavior" and evidence.watched is None:
        return "needs a model that can be run"
    if name == "agreed_model":
        return "no agreed model was given"
    if check.about == "reference" and evidence.reference is None:
        return "no reference was given"
    return "the model has no layer that this applies to"


def _verdict(results: tuple[Result, ...]) -> Verdict:
    found = {result.means for result in results if result.status == "found"}
    meanings: Iterator[Verdict] = (meaning for meaning in ("crafted", "leaks") if meaning in found)
    return next(meanings, "passed")
