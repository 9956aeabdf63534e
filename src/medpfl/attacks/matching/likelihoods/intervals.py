"""Compression that leaves an interval for every entry: sparse messages and levels.

An entry that was sent is known, one that was not is no larger than the smallest that was, and a level stands for all
that is rounded to it. What several rounds say of an entry is the intersection of their intervals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from medpfl.attacks.matching.likelihoods.base import Likelihood, View, likelihood_of
from medpfl.attacks.matching.likelihoods.rounds import compressed
from medpfl.core.mechanisms import CutOff, Pruned, Quantized, RandomK, TopK

Bounds = tuple[Tensor, Tensor]
"""Lowest and highest values of all entries, (V, *shape) each."""

ROUNDING = 1e-5
"""Share of a bound by which an entry at the bound may be below it."""

LARGEST_DIVISOR = 8
"""Levels of which the smallest one seen may be so many times the first."""


@likelihood_of(TopK)
def top_k(mechanism: TopK, view: View) -> Likelihood:
    """Entries that were sent are known, the magnitude of all others is at most the smallest one sent in their scope."""
    return replace(_within(view, lambda messages: _sparse(messages, mechanism)), survivors=True)


@likelihood_of(Pruned)
def pruned(mechanism: Pruned, view: View) -> Likelihood:
    """The same."""
    return replace(_within(view, lambda messages: _sparse(messages, mechanism)), survivors=True)


@likelihood_of(RandomK)
def random_k(mechanism: RandomK, view: View) -> Likelihood:
    """Entries that were sent are known, nothing is known of the others."""

    def bounds(messages: Sequence[Tensor]) -> list[Bounds]:
        found = []
        for message in messages:
            sent, value = message != 0, message / mechanism.factor(message[0].numel())
            found.append((torch.where(sent, value, -torch.inf), torch.where(sent, value, torch.inf)))
        return found

    return _within(view, bounds)


@likelihood_of(Quantized)
def quantized(mechanism: Quantized, view: View) -> Likelihood:
    """Entries are within half a step of their level (nearest), or within a step, likelier the closer (stochastic)."""

    def bounds(messages: Sequence[Tensor]) -> list[Bounds]:
        widths = [steps(message, mechanism) * (1.0 if mechanism.stochastic else 0.5) for message in messages]
        return [(one - width, one + width) for one, width in zip(messages, widths, strict=True)]

    return _within(view, bounds)


@likelihood_of(CutOff)
def cut_off(mechanism: CutOff, view: View) -> Likelihood:
    """Entries at the bound are at least as large, zeros at most as large as the smallest one sent, all others known."""
    limit = mechanism.bound / view.scale

    def bounds(messages: Sequence[Tensor]) -> list[Bounds]:
        sent = torch.cat([message.flatten(1) for message in messages], dim=1).abs()
        least = torch.where(sent > 0, sent, torch.inf).amin(dim=1) if mechanism.sparse else sent.new_zeros(len(sent))
        found = []
        for message in messages:
            at_limit, zero = message.abs() >= limit * (1 - ROUNDING), message == 0
            below = torch.where(zero, least.reshape(-1, *(1,) * (message.ndim - 1)), 0.0)
            lowest = torch.where(at_limit & (message < 0), -torch.inf, message - below)
            found.append((lowest, torch.where(at_limit & (message > 0), torch.inf, message + below)))
        return found

    return _within(view, bounds)


def interval_distance(gradients: Sequence[Tensor], targets: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Sum of squared distances to the intervals; targets (2, *shape) are lowest and highest values.

    >>> interval_distance([torch.tensor([0.5, 3.0])], [torch.tensor([[0.0, 0.0], [1.0, 1.0]])], torch.ones(1))
    tensor(4.)
    """
    terms = [
        ((target[0] - gradient).relu().square() + (gradient - target[1]).relu().square()).sum()
        for gradient, target in zip(gradients, targets, strict=True)
    ]
    return (torch.stack(terms) * weights).sum()


def steps(message: Tensor, mechanism: Quantized) -> Tensor:
    """The distance of two levels for every entry of messages (V, *shape), from the messages alone.

    A block's largest magnitude is always a level's, so with `scale: max` it is `levels` steps. With `scale: norm`, of
    which clients tell and updates here do not, all magnitudes are whole multiples of the step.
    """
    flat = message.flatten(1)
    size = mechanism.block or flat.shape[1]
    blocks = pad(flat, (0, -flat.shape[1] % size)).reshape(len(flat), -1, size)
    if mechanism.scale == "max":
        step = blocks.abs().amax(dim=2) / mechanism.levels
    else:
        step = torch.stack([torch.stack([_common_step(block, mechanism.levels) for block in one]) for one in blocks])
    return step[:, :, None].expand_as(blocks).reshape(len(flat), -1)[:, : flat.shape[1]].reshape(message.shape)


def _common_step(entries: Tensor, levels: int) -> Tensor:
    """The largest number of which all entries are whole multiples; zero without an entry.

    Where no entry is that number itself, it may be a multiple of the step: that one is taken for which the top level
    comes closest to the norm.
    """
    magnitudes = entries.abs()
    seen = magnitudes[magnitudes > 0]
    if not len(seen):
        return entries.new_zeros(())
    smallest = seen.min()
    for divisor in range(1, LARGEST_DIVISOR + 1):
        multiples = seen / (smallest / divisor)
        if bool(((multiples - multiples.round()).abs() < 1e-3 * multiples).all()):
            break
    step = smallest / divisor
    if divisor == 1 and len(seen) > levels:
        return step
    parts = torch.arange(1, LARGEST_DIVISOR + 1, device=entries.device)
    return step / parts[(levels * step / parts - entries.norm()).abs().argmin()]


def _sparse(messages: Sequence[Tensor], mechanism: TopK | Pruned) -> list[Bounds]:
    groups = [messages] if mechanism.scope == "global" else [[message] for message in messages]
    found: list[Bounds] = []
    for group in groups:
        entries = torch.cat([message.flatten(1) for message in group], dim=1)
        sent = entries != 0
        smallest = torch.where(sent, entries.abs(), torch.inf).amin(dim=1)
        complete = sent.sum(dim=1) >= mechanism.survivors(entries.shape[1])
        bound = torch.where(complete, smallest, 0.0)  # what was left out would have been sent were it not zero
        for message in group:
            limit = bound.reshape(-1, *(1,) * (message.ndim - 1)).expand_as(message)
            found.append((torch.where(message != 0, message, -limit), torch.where(message != 0, message, limit)))
    return found


def _within(view: View, bounds: Callable[[Sequence[Tensor]], list[Bounds]]) -> Likelihood:
    """The likelihood of all rounds: gradients are where every round's interval allows."""
    lowest: list[Any] = [-torch.inf] * len(view.names)
    highest: list[Any] = [torch.inf] * len(view.names)
    for one in compressed(view):
        for place, (low, high) in enumerate(bounds(one.message)):
            low, high = ((bound + one.before[place]) / one.times for bound in (low, high))
            lowest[place] = torch.maximum(low, torch.as_tensor(lowest[place]).to(low))
            highest[place] = torch.minimum(high, torch.as_tensor(highest[place]).to(high))
    evidence = tuple(torch.stack(pair, dim=1) for pair in zip(lowest, highest, strict=True))
    return Likelihood(interval_distance, evidence=evidence)
