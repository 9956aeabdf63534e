"""What a site's guards decided, line by line, for the site's own eyes."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medpfl.core.files import append

LOGGER = logging.getLogger("medpfl.integrations")


@dataclass(frozen=True)
class AuditLog:
    """Appends a JSON line per decision to `path` (mode 0600); Python's logging `medpfl.integrations` hears the outcome.

    The lines hold scores and reasons: they stay at the site. Logging hears reasons only where path is None, because
    frameworks may stream their logs to the server.
    """

    path: Path | None = None

    def decided(self, what: str, outcome: str, reasons: Sequence[str] = (), **values: object) -> None:
        """One line: who decided, what became of the round, and why. Raises StoreError where it cannot be written."""
        entry = {"time": time.time(), "decided_by": what, "outcome": outcome, "reasons": list(reasons), **values}
        told = "; ".join(reasons) if self.path is None else ""
        LOGGER.log(logging.INFO if outcome == "passed" else logging.WARNING, "%s: %s %s", what, outcome, told)
        if self.path is not None:
            append(Path(self.path), json.dumps(entry, ensure_ascii=True) + "\n")
