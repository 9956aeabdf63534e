"""Signed digests of what clients received: what must be noticed, and what must not count."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from medpfl.core.errors import ModelError
from medpfl.guards.digests import Meeting, Statement, challenge, compare, digest, shared_key, statement

SIGN, VERIFY = shared_key(b"0123456789abcdef")
CLIENTS = ("north", "south", "west")
MEETING = Meeting("lungs", 7, challenge({name: name * 2 for name in CLIENTS}), CLIENTS)
MODEL = {"a.weight": torch.arange(6.0).reshape(2, 3), "a.bias": torch.zeros(2), "n": torch.tensor(3)}


def said(client: str, tensors: dict[str, torch.Tensor] = MODEL, meeting: Meeting = MEETING) -> Statement:
    return statement(meeting, client, digest(tensors), SIGN)


@pytest.mark.parametrize(
    "other",
    [
        {**MODEL, "a.bias": torch.tensor([0.0, 1e-30])},
        {**MODEL, "a.bias": torch.tensor([0.0, -0.0])},
        {**MODEL, "a.bias": torch.zeros(2, dtype=torch.float64)},
        {**MODEL, "a.weight": MODEL["a.weight"].reshape(3, 2)},
        {**MODEL, "extra": torch.zeros(0)},
        {"a.weigh": MODEL["a.weight"], "a.bias": MODEL["a.bias"], "n": MODEL["n"]},
    ],
)
def test_any_difference_changes_the_digest(other: dict[str, torch.Tensor]) -> None:
    assert digest(other) != digest(MODEL)
    assert compare(MEETING, [said("north"), said("south"), said("west", other)], VERIFY).status == "disagreed"


def test_how_tensors_lie_in_memory_changes_nothing() -> None:
    turned = {name: tensor.clone() for name, tensor in reversed(MODEL.items())}
    turned["a.weight"] = MODEL["a.weight"].T.contiguous().T
    assert digest(turned) == digest(MODEL)


def test_the_odd_one_out_is_named() -> None:
    found = compare(MEETING, [said("north"), said("west"), said("south", {"a": torch.ones(1)})], VERIFY)
    assert list(found.groups.values()) == [("north", "west"), ("south",)]
    assert "nobody trains or sends" in found.sentence


@pytest.mark.parametrize(
    "changes",
    [
        {"round": 6},
        {"federation": "brains"},
        {"challenge": challenge({"north": "old"})},
        {"clients": ("north", "south")},
    ],
)
def test_a_statement_of_another_round_does_not_count(changes: dict[str, object]) -> None:
    replayed = said("west", meeting=dataclasses.replace(MEETING, **changes))  # type: ignore[arg-type]
    found = compare(MEETING, [said("north"), said("south"), replayed], VERIFY)
    assert (found.status, found.rejected) == ("incomplete", {"west": "not signed by it for this round"})


def test_nobody_without_the_key_speaks_for_a_client() -> None:
    sign, _ = shared_key(b"the server's own guess")
    forged = statement(MEETING, "west", digest(MODEL), sign)
    copied = Statement("west", digest(MODEL), said("north").signature)
    for one in (forged, copied, Statement("west", digest(MODEL), "")):
        assert compare(MEETING, [said("north"), said("south"), one], VERIFY).status == "incomplete"


def test_who_says_two_things_agrees_with_nobody() -> None:
    twice = [said(name) for name in CLIENTS] + [said("west", {"a": torch.ones(1)})]
    found = compare(MEETING, twice, VERIFY)
    assert (found.status, found.rejected) == ("disagreed", {"west": "says two different things"})


def test_strangers_and_silence_keep_a_round_from_going_on() -> None:
    assert compare(MEETING, [], VERIFY).missing == CLIENTS
    stranger = compare(MEETING, [*(said(name) for name in CLIENTS), said("east")], VERIFY)
    assert (stranger.status, list(stranger.rejected)) == ("incomplete", ["east"])


def test_bad_input_is_one_clear_sentence() -> None:
    with pytest.raises(ModelError, match="at least 16 random bytes, found 5"):
        shared_key(b"short")
    with pytest.raises(ModelError, match="no tensors"):
        digest({})
