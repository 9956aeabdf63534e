"""What three sites run every app inside, whatever the app lists: their SuperNodes name one of these functions."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from medpfl.defenses import Clip
from medpfl.integrations.flower import AnswersMod, AuditLog, DefenseMod, PinsMod

BOUND = 0.05
"""Largest change that the first site lets out, a Euclidean norm."""

FEWEST, HELD = 16, 8
"""The second site takes part with so many images only, and holds so many."""


def clipped() -> list[Any]:
    """Nothing but an update leaves, no setting that was not agreed counts, and no change is above the bound."""
    return [AnswersMod(log=log()), PinsMod(only_known=True, log=log()), DefenseMod(Clip(bound=BOUND), log=log())]


def too_few() -> list[Any]:
    """Refuses, because the site holds too few images."""
    return [PinsMod(examples=HELD, fewest_examples=FEWEST, log=log())]


def log() -> AuditLog:
    """The site's own log."""
    return AuditLog(Path(os.environ["SITE_LOG"]))
