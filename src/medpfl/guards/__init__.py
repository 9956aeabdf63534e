"""Guards: a client's own checks that can stop a round, one file each, registered by being imported here."""

from medpfl.guards.base import GUARDS, Guard
from medpfl.guards.leakage_gate import LeakageGate
from medpfl.guards.none import NoGuard
from medpfl.guards.norm_bound import NormBound
from medpfl.guards.same_model import SameModel
from medpfl.guards.vetting_guard import VettingGuard

__all__ = ["GUARDS", "Guard", "LeakageGate", "NoGuard", "NormBound", "SameModel", "VettingGuard"]
