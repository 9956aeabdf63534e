"""From a spec to results: grid, plan, runner, store, tables."""

from medpfl.audit.runner import AuditSummary, run_audit
from medpfl.audit.spec import Spec, load_spec, parse_spec

__all__ = ["AuditSummary", "Spec", "load_spec", "parse_spec", "run_audit"]
