"""Defenses: one file each, registered by being imported here."""

from medpfl.defenses.base import DEFENSES, Defense
from medpfl.defenses.gaussian import Gaussian
from medpfl.defenses.laplace import Laplace
from medpfl.defenses.none import NoDefense

__all__ = ["DEFENSES", "Defense", "Gaussian", "Laplace", "NoDefense"]
