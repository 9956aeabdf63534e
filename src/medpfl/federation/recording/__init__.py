"""Recordings: what somebody saw of a real federation, round by round, in a folder that outlives a crash."""

from medpfl.federation.recording.behind import Behind
from medpfl.federation.recording.events import About, Event
from medpfl.federation.recording.reader import Recorded, Recording, read_recording
from medpfl.federation.recording.storage import FolderStorage, MemoryStorage, Storage
from medpfl.federation.recording.writer import Recorder, record

__all__ = [
    "About",
    "Behind",
    "Event",
    "FolderStorage",
    "MemoryStorage",
    "Recorded",
    "Recorder",
    "Recording",
    "Storage",
    "read_recording",
    "record",
]
