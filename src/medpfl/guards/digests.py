"""Clients compare what they received: digests of models, signed and exchanged where the server cannot reach."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from medpfl.core.domain import GlobalModel, Tensors
from medpfl.core.errors import ModelError
from medpfl.guards.vetting.verdict import tensors_of

Sign = Callable[[bytes], str]
"""A client's signature of a text, as hexadecimal digits."""

Verify = Callable[[str, bytes, str], bool]
"""Whether a text was signed by that client."""

SHORTEST_KEY = 16
"""Bytes of a shared key at least."""


@dataclass(frozen=True)
class Meeting:
    """What makes a comparison this one and no earlier one.

    federation: its name. round: its number. challenge: from fresh numbers of all clients, see `challenge`. clients: all
    who take part in the round.
    """

    federation: str
    round: int
    challenge: str
    clients: tuple[str, ...]


@dataclass(frozen=True)
class Statement:
    """What one client says that it received, signed."""

    client: str
    digest: str
    signature: str


@dataclass(frozen=True)
class Agreement:
    """What came of a comparison.

    status: `agreed` only if every client's statement is there, is its own, and names the same digest. groups: digest ->
    clients that say they received that, the largest group first. rejected: client -> why its statement does not count.
    missing: clients without a statement.
    """

    status: Literal["agreed", "disagreed", "incomplete"]
    groups: Mapping[str, tuple[str, ...]]
    rejected: Mapping[str, str]
    missing: tuple[str, ...]

    @property
    def sentence(self) -> str:
        """What to tell people, and what to do."""
        if self.status == "agreed":
            return "all clients received the same"
        if self.status == "disagreed":
            said = "; ".join(f"{', '.join(clients)}: {digest[:12]}" for digest, clients in self.groups.items())
            return (
                f"clients received different models or settings ({said}): nobody trains or sends, all keep what they "
                "received, and people find out why"
            )
        absent = [f"{client} ({why})" for client, why in self.rejected.items()]
        absent += [f"{client} (no statement)" for client in self.missing]
        return f"not all clients confirmed what they received: {', '.join(absent)}; nobody sends until they have"


def digest(received: GlobalModel | Tensors, settings: Mapping[str, object] | None = None) -> str:
    """SHA-256 of named tensors and of settings, as hexadecimal digits: equal for equal content and nothing else.

    Names are sorted; of every tensor name, type, shape and the bytes of its values count, so a file's format and the
    order of its entries do not. settings: what else the server told, such as recipe and clipping, as JSON values.
    Raises `ModelError` without any tensor, and for settings that are no such values.

    >>> one, other = {"a": torch.zeros(2), "b": torch.ones(1)}, {"b": torch.ones(1), "a": torch.zeros(2)}
    >>> digest(one) == digest(other), digest(one) == digest(one, {"learning_rate": 0.1})
    (True, False)
    >>> digest({"a": torch.zeros(2, 1)}) == digest({"a": torch.zeros(1, 2)})
    False
    """
    tensors = tensors_of(received)
    if not tensors:
        raise ModelError("what was received has no tensors: expected a model, or a state dict with tensors by name")
    found = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        _add(found, name, str(tensor.dtype), repr(tuple(tensor.shape)))
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b"")
    try:
        _add(found, json.dumps(dict(settings or {}), sort_keys=True, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ModelError(f"settings to compare must be texts, finite numbers, lists and mappings: {error}") from None
    return found.hexdigest()


def challenge(nonces: Mapping[str, str]) -> str:
    """One fresh number out of those of all clients; nobody who sent a fresh one can be shown an old comparison.

    >>> challenge({"a": "1", "b": "2"}) == challenge({"b": "2", "a": "1"}), challenge({"a": "12"}) == challenge({"a": "1"})
    (True, False)
    """
    found = hashlib.sha256()
    for client in sorted(nonces):
        _add(found, client, nonces[client])
    return found.hexdigest()


def statement(meeting: Meeting, client: str, received: str, sign: Sign) -> Statement:
    """What the client sends to all others. received: its digest."""
    return Statement(client, received, sign(_text(meeting, client, received)))


def compare(meeting: Meeting, statements: Sequence[Statement], verify: Verify) -> Agreement:
    """Whether all clients received the same, as far as their statements say.

    A statement counts if its client takes part, signed it for this federation, round and challenge, and made no other.

    >>> sign, verify = shared_key(b"sixteen bytes or more")
    >>> meeting = Meeting("lungs", 3, challenge({"north": "81f0", "south": "c24e"}), ("north", "south"))
    >>> same = [statement(meeting, name, digest({"w": torch.zeros(2)}), sign) for name in meeting.clients]
    >>> compare(meeting, same, verify).status
    'agreed'
    >>> other = statement(meeting, "south", digest({"w": torch.ones(2)}), sign)
    >>> compare(meeting, [same[0], other], verify).status, compare(meeting, same[:1], verify).sentence
    ('disagreed', 'not all clients confirmed what they received: south (no statement); nobody sends until they have')
    """
    rejected: dict[str, str] = {}
    said: dict[str, str] = {}
    for one in statements:
        if one.client not in meeting.clients:
            rejected[one.client] = "takes no part in this round"
        elif not verify(one.client, _text(meeting, one.client, one.digest), one.signature):
            rejected[one.client] = "not signed by it for this round"
        elif said.setdefault(one.client, one.digest) != one.digest:
            rejected[one.client] = "says two different things"
    for client in set(rejected) & set(said):
        del said[client]
    groups: dict[str, tuple[str, ...]] = {}
    for client, received in said.items():
        groups[received] = (*groups.get(received, ()), client)
    ordered = dict(sorted(groups.items(), key=lambda group: -len(group[1])))
    missing = tuple(client for client in meeting.clients if client not in said and client not in rejected)
    status: Literal["agreed", "disagreed", "incomplete"] = "agreed"
    if len(groups) > 1 or "says two different things" in rejected.values():
        status = "disagreed"
    elif rejected or missing:
        status = "incomplete"
    return Agreement(status, ordered, rejected, missing)


def shared_key(key: bytes) -> tuple[Sign, Verify]:
    """Signatures by HMAC-SHA-256 under a key that all clients have and the server has not.

    It keeps the server out. That one client does not speak for another needs a key pair for each, which any library
    gives as the same two functions. Raises `ModelError` for a key that can be guessed.
    """
    if len(key) < SHORTEST_KEY:
        raise ModelError(f"a shared key needs at least {SHORTEST_KEY} random bytes, found {len(key)}")

    def sign(text: bytes) -> str:
        return hmac.new(key, text, hashlib.sha256).hexdigest()

    def verify(_client: str, text: bytes, signature: str) -> bool:
        return hmac.compare_digest(sign(text).encode(), signature.encode())

    return sign, verify


def _text(meeting: Meeting, client: str, received: str) -> bytes:
    """What is signed: everything that a statement is about."""
    said = [meeting.federation, meeting.round, meeting.challenge, sorted(meeting.clients), client, received]
    return json.dumps(said, ensure_ascii=True).encode()


def _add(found: hashlib._Hash, *texts: str) -> None:
    """Adds texts with their lengths, so that none runs into the next."""
    for text in texts:
        coded = text.encode()
        found.update(len(coded).to_bytes(8, "little") + coded)
