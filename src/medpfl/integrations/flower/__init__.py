"""Flower: a recorder for the server, mods for clients, crafted parameters to test them, and a site's own policy.

Imports `flwr` (extra `medpfl[flower]`), which nothing else in MedPFL does. Only Flower's message API is used; what needs
the legacy workflow of SecAgg+ stands in `secagg`.
"""

from __future__ import annotations

from importlib.util import find_spec

from medpfl.core.errors import MissingExtra

if find_spec("flwr") is None:
    raise MissingExtra("the Flower integration needs Flower: pip install 'medpfl[flower]'")

from medpfl.integrations.common.audit_log import AuditLog
from medpfl.integrations.flower.answers import AnswersMod
from medpfl.integrations.flower.crafted import CraftedStrategy
from medpfl.integrations.flower.defenses import DefenseMod
from medpfl.integrations.flower.guards import GateMod, VettingMod
from medpfl.integrations.flower.pins import PinsMod, SecureAggregationPins
from medpfl.integrations.flower.recorder import RecordingStrategy

__all__ = [
    "AnswersMod",
    "AuditLog",
    "CraftedStrategy",
    "DefenseMod",
    "GateMod",
    "PinsMod",
    "RecordingStrategy",
    "SecureAggregationPins",
    "VettingMod",
]
