"""What a server may not choose for a client: its recipe, the arithmetic of secure aggregation, and how few take part."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ConfigRecord, Context, Message, MessageType

from medpfl.integrations.common.audit_log import AuditLog
from medpfl.integrations.flower.records import config_of, refused

SECURE_AGGREGATION = "secaggplus_configs"
KNOWN = "medpfl.pins"
"""Keys: the record in which Flower's SecAgg+ tells clients its parameters, and what this mod remembers of a round."""


@dataclass(frozen=True)
class SecureAggregationPins:
    """What a site accepts of SecAgg+; Flower's client takes all of it from the server's message and checks types only.

    clients, threshold: at least so many take part, and have to agree before anything is unmasked. The other four must
    be exactly what was agreed: a server that may choose clipping and quantization reads crafted layers through them.
    """

    clients: int = 3
    threshold: int = 2
    clipping_range: float = 8.0
    target_range: int = 2**22
    mod_range: int = 2**32
    max_weight: float = 1000.0

    def problem(self, told: Mapping[str, Any]) -> str | None:
        """Why what the server told in the setup stage is not accepted; None if it is."""
        for key, least in (("sample_num", self.clients), ("threshold", self.threshold)):
            if not _number(told.get(key)) or told[key] < least:
                return f"secure aggregation: {key} must be at least {least}, the server told {told.get(key)!r}"
        for key in ("clipping_range", "target_range", "mod_range", "max_weight"):
            if told.get(key) != getattr(self, key):
                return (
                    f"secure aggregation: {key} was agreed as {getattr(self, key)}, the server told {told.get(key)!r}"
                )
        return None


@dataclass(frozen=True)
class PinsMod:
    """Takes part only as agreed.

    config: settings that a train message may carry with no other value, such as {"lr": 0.01, "local-epochs": 1}; one
    that it leaves out is the app's own business. only_known: refuse settings that are not listed, apart from
    `server-round`. examples: the client's own number of images, and the fewest with which it takes part.
    secure_aggregation: None where SecAgg+ is not used; then its messages are refused. Put it outside `secaggplus_mod`.
    Unmask requests are refused where active and dead clients overlap, are none of those whose keys came, or are fewer
    than the threshold: whoever gets both kinds of shares of one client can unmask it.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    only_known: bool = False
    examples: int | None = None
    fewest_examples: int = 1
    secure_aggregation: SecureAggregationPins | None = None
    log: AuditLog = field(default_factory=AuditLog)

    def __call__(self, message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
        """The app's answer, or an error."""
        if str(message.metadata.message_type).partition(".")[0] != MessageType.TRAIN:
            return call_next(message, context)
        problem = self._problem(message, context)
        if problem is not None:
            self.log.decided("pins", "withheld", (problem,))
            return refused(message)
        return call_next(message, context)

    def _problem(self, message: Message, context: Context) -> str | None:
        if self.examples is not None and self.examples < self.fewest_examples:
            return f"this client holds {self.examples} images, fewer than the {self.fewest_examples} with which it takes part"
        told = config_of(message)
        protocol = message.content.config_records.get(SECURE_AGGREGATION)
        if protocol is not None:
            told = {name: value for name, value in told.items() if name not in protocol}
            if (problem := self._protocol(dict(protocol), context)) is not None:
                return problem
        elif self.secure_aggregation is not None:
            return "secure aggregation was agreed, but the server asks for an update without it"
        for name, value in told.items():
            if name in self.config and value != self.config[name]:
                return f"{name} was agreed as {self.config[name]!r}, the server told {value!r}"
            if self.only_known and name not in self.config and name != "server-round":
                return f"the server told {name}, which was not agreed"
        return None

    def _protocol(self, told: Mapping[str, Any], context: Context) -> str | None:
        pins, stage = self.secure_aggregation, told.get("stage")
        if pins is None:
            return "the server starts secure aggregation, which was not agreed"
        if stage == "setup":
            if (problem := pins.problem(told)) is not None:
                return problem
            context.state[KNOWN] = ConfigRecord({"threshold": int(told["threshold"])})
        elif stage == "share_keys":
            nodes = [name for name in told if name != "stage"]
            if len(nodes) < pins.clients:
                return f"secure aggregation: keys of {len(nodes)} clients came, at least {pins.clients} were agreed"
            known = dict(context.state.config_records.get(KNOWN, {}))
            context.state[KNOWN] = ConfigRecord({**known, "nodes": nodes})
        elif stage == "unmask":
            return _unmasking(told, dict(context.state.config_records.get(KNOWN, {})), pins)
        return None


def _unmasking(told: Mapping[str, Any], known: Mapping[str, Any], pins: SecureAggregationPins) -> str | None:
    active, dead = told.get("active_nids"), told.get("dead_nids")
    if not isinstance(active, list) or not isinstance(dead, list):
        return "secure aggregation: the request to unmask names no lists of clients"
    if set(active) & set(dead) or len(set(active)) != len(active) or len(set(dead)) != len(dead):
        return "secure aggregation: the request to unmask names a client as both active and dead, or twice"
    if len(active) < max(pins.threshold, int(known.get("threshold", 0))):
        return f"secure aggregation: the request to unmask names {len(active)} active clients, fewer than the threshold"
    nodes = known.get("nodes")
    if not isinstance(nodes, list) or not {str(node) for node in [*active, *dead]} <= set(nodes):
        return "secure aggregation: the request to unmask names other clients than those whose keys came"
    return None


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
