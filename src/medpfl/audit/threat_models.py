"""Who the adversary is: where it listens and what it may change."""

from __future__ import annotations

from dataclasses import dataclass

from medpfl.core.domain import CAPABILITIES
from medpfl.core.registry import Registry


@dataclass(frozen=True)
class ThreatModel:
    """A place to listen.

    sees_inside_channel: whether it receives what a secure channel delivers to the server.
    capabilities: what the adversary may change at most, keys of `CAPABILITIES`.
    """

    sees_inside_channel: bool
    capabilities: frozenset[str] = frozenset()


THREAT_MODELS: Registry[ThreatModel] = Registry("threat model")
THREAT_MODELS.add(
    "eavesdropper",
    ThreatModel(sees_inside_channel=False),
    summary="reads the messages of one client on an unprotected channel; sees nothing behind a secure one",
)
THREAT_MODELS.add(
    "honest_server",
    ThreatModel(sees_inside_channel=True),
    summary="runs the protocol as agreed and is curious about what it receives (honest but curious)",
)
THREAT_MODELS.add(
    "malicious_server",
    ThreatModel(sees_inside_channel=True, capabilities=frozenset(CAPABILITIES)),
    summary="may change what it sends, as far as `can` says",
)
