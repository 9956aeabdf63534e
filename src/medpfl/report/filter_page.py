"""The audit of a filter as one HTML page that needs nothing but a browser."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from medpfl.audit.filters import FilterAudit
from medpfl.audit.filters.noise import CALLS
from medpfl.core.errors import StoreError
from medpfl.core.files import write_atomically
from medpfl.core.version import __version__
from medpfl.report import formatting

LEVELS = {"problem": "attention", "note": "", "good": "good"}
"""Level of a finding -> its class in the page."""


def write_filter_page(audit: FilterAudit, path: Path) -> Path:
    """Writes the page at once and complete. Raises StoreError where it cannot be written."""
    try:
        write_atomically(path, render_filter_page(audit).encode("utf-8"))
    except OSError as error:
        raise StoreError(f"{path}: cannot be written ({error.strerror}); give another file") from None
    return path


def render_filter_page(audit: FilterAudit) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=PackageLoader("medpfl.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(decimals=formatting.decimals)
    assert environment.loader is not None
    return environment.get_template("filter.html").render(
        audit=audit,
        topics=[(topic, list(found)) for topic, found in groupby(audit.findings, key=lambda one: one.topic)],
        levels=LEVELS,
        rows=[row for row in audit.measured.leakage if not row.reason],
        style=Markup(environment.loader.get_source(environment, "report.css")[0]),
        version=__version__,
        calls=CALLS,
    )
