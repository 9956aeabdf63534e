"""Vetting: is the model that came from the server made to give images away? Looked at before any training on it."""

from medpfl.guards.vetting import behavior, dense, head, kernels, one_sided, order, reference
from medpfl.guards.vetting.agreed import TASKS, TaskName, build_agreed
from medpfl.guards.vetting.base import CHECKS, Check, Evidence, Result
from medpfl.guards.vetting.verdict import NOT_COVERED, Vetting, check_tensors, vet
from medpfl.guards.vetting.watch import MOST_IMAGES

__all__ = [
    "CHECKS",
    "MOST_IMAGES",
    "NOT_COVERED",
    "TASKS",
    "Check",
    "Evidence",
    "Result",
    "TaskName",
    "Vetting",
    "behavior",
    "build_agreed",
    "check_tensors",
    "dense",
    "head",
    "kernels",
    "one_sided",
    "order",
    "reference",
    "vet",
]
