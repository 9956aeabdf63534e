"""Which orders of defenses make no sense, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from medpfl.defenses.base import Defense, registered_name
from medpfl.federation.hooks import Hooks

HOOKS_IN_ORDER = ("batch", "per_example", "gradient", "update")
"""Where a defense can begin to act within a round, in the order of the client step."""

ACTS_ON = {
    "batch": "the images before each step",
    "per_example": "each image's gradient",
    "gradient": "the gradient of each step",
    "update": "the update after training",
}

IMAGE_MIXERS = ("mixup", "instahide")
"""Defenses that put one image into several training images."""


def order_problems(parts: Sequence[Defense]) -> list[str]:
    """Reasons against applying the defenses in this order, each with a way out; empty if nothing speaks against it."""
    return [problem for rule in _RULES for problem in rule(parts)]


def begins_at(part: Defense) -> int | None:
    """The place in `HOOKS_IN_ORDER` of the first hook that a defense has; None where it changes the model only."""
    return next((place for place, name in enumerate(HOOKS_IN_ORDER) if _has(part, name)), None)


def _has(part: Defense, hook: str) -> bool:
    return getattr(type(part), hook) is not getattr(Hooks, hook)


def is_private(part: Defense) -> bool:
    """Whether noise of this defense is, or may become by clipping before it, a formal guarantee."""
    return part.adds() is not None or _has(part, "guarantee")


def _as_in_the_round(parts: Sequence[Defense]) -> Iterator[str]:
    """The list must say what happens."""
    acting = [(part, place) for part in parts if (place := begins_at(part)) is not None]
    for (before, later_place), (after, place) in pairwise(acting):
        if place < later_place:
            first, second = registered_name(after), registered_name(before)
            yield (
                f"compose: {first} acts on {ACTS_ON[HOOKS_IN_ORDER[place]]} and so before {second}, which acts on "
                f"{ACTS_ON[HOOKS_IN_ORDER[later_place]]}; list {first} before {second}"
            )


def _one_clips_each_image(parts: Sequence[Defense]) -> Iterator[str]:
    several = [registered_name(part) for part in parts if part.clips_per_example]
    if len(several) > 1:
        yield f"compose: {' and '.join(several)} both turn each image's gradient into one of the step; use one of them"


def _noise_after_sign(parts: Sequence[Defense]) -> Iterator[str]:
    for place, part in enumerate(parts):
        late = next((later for later in parts[place + 1 :] if later.adds() is not None), None)
        if registered_name(part) == "sign" and late is not None:
            yield (
                f"compose: {registered_name(late)} after sign adds noise to numbers that are +-1 already, so nothing is "
                f"compressed and the noise means something else; list {registered_name(late)} before sign"
            )


def _feedback_before_noise(parts: Sequence[Defense]) -> Iterator[str]:
    """What error feedback holds back of an un-noised update is sent in later rounds, beyond what noise is meant for."""
    for place, part in enumerate(parts):
        late = next((later for later in parts[place + 1 :] if is_private(later)), None)
        if getattr(part, "error_feedback", False) and late is not None:
            first, second = registered_name(part), registered_name(late)
            yield (
                f"compose: the error feedback of {first} keeps what the noise of {second} has not reached and adds it to "
                f"later rounds; list {second} before {first}, or use error_feedback: false"
            )


def _images_read_after_noise(parts: Sequence[Defense]) -> Iterator[str]:
    for place, part in enumerate(parts):
        late = next((later for later in parts[place + 1 :] if later.reads_images), None)
        if part.clips_per_example and late is not None:
            first, second = registered_name(part), registered_name(late)
            yield (
                f"compose: {second} looks at the private images again after the noise of {first}, so it is no mere "
                f"post-processing and the guarantee of {first} is lost; use one of them"
            )


def _images_mixed_before_clipping(parts: Sequence[Defense]) -> Iterator[str]:
    for place, part in enumerate(parts):
        late = next((later for later in parts[place + 1 :] if later.clips_per_example), None)
        if registered_name(part) in IMAGE_MIXERS and late is not None:
            first, second = registered_name(part), registered_name(late)
            yield (
                f"compose: {first} puts an image into several training images, of which {second} bounds each, so one "
                f"image counts several times against its guarantee; use one of them"
            )


_RULES: tuple[Callable[[Sequence[Defense]], Iterator[str]], ...] = (
    _as_in_the_round,
    _one_clips_each_image,
    _noise_after_sign,
    _feedback_before_noise,
    _images_read_after_noise,
    _images_mixed_before_clipping,
)
