"""Replays recordings of real federations: which updates leak how much, with or without ground truth."""

from medpfl.audit.replay.run import ReplaySummary, replay
from medpfl.audit.replay.settings import DEFAULT_ATTACKS, Replay, prepare_replay

__all__ = ["DEFAULT_ATTACKS", "Replay", "ReplaySummary", "prepare_replay", "replay"]
