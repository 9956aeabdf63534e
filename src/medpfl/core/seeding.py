"""Separate random streams, each keyed by exactly what it depends on.

Two attacks on one cell meet the same victims, networks and noise, because those streams are not keyed by the attack.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch


def derive_seed(stream: str, *keys: Any) -> int:
    """A 63-bit seed from a stream's name and what it is keyed by (anything that JSON can write).

    >>> derive_seed("victims", 0, "brain_mri") == derive_seed("victims", 0, "brain_mri")
    True
    >>> derive_seed("victims", 0, "brain_mri") == derive_seed("model", 0, "brain_mri")
    False
    """
    text = json.dumps([stream, *keys], sort_keys=True, separators=(",", ":"))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def generator(stream: str, *keys: Any) -> torch.Generator:
    """A CPU generator for one stream."""
    return torch.Generator().manual_seed(derive_seed(stream, *keys))


def content_hash(*parts: Any) -> str:
    """Twelve hexadecimal digits that identify JSON-like content."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]
