"""MedPFL shows what can be reconstructed of patients' images from the updates of a federated model."""

from __future__ import annotations

from typing import Any

from medpfl.core.version import __version__

__all__ = ["AuditSummary", "Spec", "__version__", "load_spec", "parse_spec", "record", "run_audit", "write_report"]


def __getattr__(name: str) -> Any:
    """Imports the public functions when they are first used, so that `import medpfl` stays light."""
    if name == "write_report":
        from medpfl.report import write_report

        return write_report
    if name == "record":
        from medpfl.federation.recording import record

        return record
    if name in __all__:
        import medpfl.audit

        return getattr(medpfl.audit, name)
    raise AttributeError(f"module 'medpfl' has no attribute '{name}'")
