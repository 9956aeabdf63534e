"""Vetting: is the model that came from the server made to give images away? Looked at before any training on it."""

from medpfl.guards.vetting import behavior, dense, head, kernels, order, reference
from medpfl.guards.vetting.base import CHECKS, Check, Evidence, Result
from medpfl.guards.vetting.verdict import NOT_COVERED, Vetting, check_tensors, vet

__all__ = [
    "CHECKS",
    "NOT_COVERED",
    "Check",
    "Evidence",
    "Result",
    "Vetting",
    "behavior",
    "check_tensors",
    "dense",
    "head",
    "kernels",
    "order",
    "reference",
    "vet",
]
