"""Replays recordings of real federations: which updates leak how much, with or without ground truth."""

from medpfl.audit.replay.choosing import by_recording, recording_names, truth_folders
from medpfl.audit.replay.run import ReplaySummary, replay
from medpfl.audit.replay.settings import DEFAULT_ATTACKS, Replay, prepare_replay

__all__ = [
    "DEFAULT_ATTACKS",
    "Replay",
    "ReplaySummary",
    "by_recording",
    "prepare_replay",
    "recording_names",
    "replay",
    "truth_folders",
]
