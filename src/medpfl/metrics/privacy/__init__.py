"""Differential privacy as numbers: epsilon, reconstruction bounds, empirical lower bounds. Pure functions."""

from medpfl.metrics.privacy.accounting import PrivacyCurve, group_epsilon, privacy_curve
from medpfl.metrics.privacy.one_run import LowerBound, one_run_audit
from medpfl.metrics.privacy.one_run_gaussian import one_run_gaussian_audit
from medpfl.metrics.privacy.prior_success import prior_success
from medpfl.metrics.privacy.reconstruction_bounds import ReconstructionBound, reconstruction_bound
from medpfl.metrics.privacy.simulated_bound import simulated_bound
from medpfl.metrics.privacy.statements import Statement, bound, bound_curve, state

__all__ = [
    "LowerBound",
    "PrivacyCurve",
    "ReconstructionBound",
    "Statement",
    "bound",
    "bound_curve",
    "group_epsilon",
    "one_run_audit",
    "one_run_gaussian_audit",
    "prior_success",
    "privacy_curve",
    "reconstruction_bound",
    "simulated_bound",
    "state",
]
