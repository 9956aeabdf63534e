"""The report of an audit as one self-contained HTML file."""

from medpfl.report.rendering import write_report

__all__ = ["write_report"]
