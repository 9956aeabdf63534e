"""A filter for the server that records what an honest but curious one sees."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import nvflare
from nvflare.apis.dxo import DXO
from nvflare.apis.event_type import EventType
from nvflare.apis.filter import Filter, FilterChainType, FilterContextKey
from nvflare.apis.fl_constant import FLContextKey, ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable

from medpfl.audit.validation import build
from medpfl.core.domain import UpdateKind
from medpfl.core.errors import DataError, InputError, SpecError
from medpfl.federation.recording import About, Behind, Recorder
from medpfl.federation.recording.writer import LIMIT
from medpfl.integrations.common.careful import LOGGER, carefully
from medpfl.integrations.flare.exchange import (
    CHANGES,
    METRICS,
    WEIGHTS,
    kind_of,
    peer_of,
    plain,
    read,
    round_of,
    tensors_of,
)

STEPS = "NUM_STEPS_CURRENT_ROUND"
"""What clients of FLARE's own recipes say of how much they trained."""


class Shared:
    """The recorders of this process by folder: filters of what goes out and of what comes in are objects of their own.

    What is handed over is written behind the training, of one round at most, until `close`.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.recorders: dict[Path, Recorder | None] = {}
        self.rounds: dict[tuple[Path, str], int] = {}
        self.waiting: set[tuple[Path, str]] = set()
        self.behind: Behind | None = None

    def recorder(self, folder: Path, about: About, limit: int) -> Recorder | None:
        """The recorder of a folder; None where it cannot be used, which is a warning once."""
        if folder not in self.recorders:
            try:
                self.recorders[folder] = Recorder(folder, about, limit=limit)
            except InputError as error:
                LOGGER.warning("nothing is recorded, training goes on: %s", error)
                self.recorders[folder] = None
        return self.recorders[folder]

    def do(self, recorder: Recorder, number: int, act: Callable[[], None]) -> None:
        """Hands over what is to be recorded of a round."""
        if self.behind is None:
            self.behind = Behind()
        self.behind.do(partial(carefully, recorder, number, act))

    def begins(self, folder: Path, number: int) -> list[tuple[int, str]]:
        """Round and site of those that have not answered a round before this one; they are told once.

        Waits where that round is new, until all of the rounds before is written.
        """
        latest = max((told for (place, _), told in self.rounds.items() if place == folder), default=number)
        if latest < number and self.behind is not None:
            self.behind.wait()
        found = sorted((self.rounds[place], place[1]) for place in self.waiting if place[0] == folder)
        gone = [(told, client) for told, client in found if told < number]
        self.waiting -= {(folder, client) for _, client in gone}
        return gone

    def close(self) -> None:
        """Until all is written; then others may write to the folders."""
        with self.lock:
            if self.behind is not None:
                self.behind.close()
                self.behind = None
            for recorder in self.recorders.values():
                if recorder is not None:
                    recorder.close()
            self.recorders.clear()
            self.rounds.clear()
            self.waiting.clear()


SHARED = Shared()


class RecordingFilter(Filter):
    """Records models that the server sends and the sites' answers, for `medpfl replay`; changes nothing.

    The same class goes to the server's task_data_filters and its task_result_filters, with the same folder. Training
    goes on whatever happens to the recording: a folder that another recorder uses, a full disk, an answer that cannot
    be read or the size limit are warnings and, where possible, lines of its log. Files are written behind the training, of
    one round at most; at the end of a run, which FLARE tells filters of a job, all is written before the process ends.

    folder: of the recording. limit: bytes that it may take. channel, defense: what replay should know of how updates
    travel. tasks: those that are recorded. examples_key: of the meta, whose number times `images_per_step` is the number of
    images; by default the number of steps, as FLARE's recipes weight sites. Raises SpecError for parameters that are
    wrong.
    """

    def __init__(
        self,
        folder: str,
        limit: int = LIMIT,
        channel: str = "plain",
        defense: str = "",
        tasks: Sequence[str] = ("train",),
        examples_key: str = STEPS,
        images_per_step: int = 1,
    ) -> None:
        super().__init__()
        if not isinstance(folder, str) or not folder:
            raise SpecError(f"folder: expected the path of the recording's folder, found {folder!r}")
        for key, number in (("limit", limit), ("images_per_step", images_per_step)):
            if not isinstance(number, int) or isinstance(number, bool) or number < 1:
                raise SpecError(f"{key}: expected a whole number from 1, found {number!r}")
        if isinstance(tasks, str) or not tasks or not all(isinstance(task, str) for task in tasks):
            raise SpecError(f"tasks: expected a list of names, found {tasks!r}")
        self.folder, self.limit, self.channel, self.defense = folder, limit, channel, defense
        self.tasks, self.examples_key, self.images_per_step = list(tasks), examples_key, images_per_step
        self.about: About = build(
            About, {"source": f"nvflare {nvflare.__version__}", "channel": channel, "defense": defense}, "about"
        )

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """The message, as it is."""
        try:
            if str(fl_ctx.get_prop(FLContextKey.TASK_NAME) or self.tasks[0]) in self.tasks:
                with SHARED.lock:
                    self._record(shareable, fl_ctx)
        except Exception as error:  # noqa: BLE001  recording never stops a training, whatever a message holds
            LOGGER.warning("a message is not recorded: %s: %s", type(error).__name__, error)
        return shareable

    def _record(self, message: Shareable, context: FLContext) -> None:
        folder = Path(self.folder).resolve()
        recorder = SHARED.recorder(folder, self.about, self.limit)
        if recorder is None:
            return
        client = peer_of(message, context)
        outward = self.get_prop(FilterContextKey.CHAIN_TYPE) == FilterChainType.TASK_DATA_CHAIN
        try:
            found: DXO | None = read(message)
        except DataError:
            found = None
        number = round_of(message, found, context)
        if number is None:
            number = SHARED.rounds.get((folder, client), 0)
        if outward:
            for told, silent in SHARED.begins(folder, number):
                SHARED.do(
                    recorder, told, partial(recorder.failed, told, silent, "no answer came before the next round")
                )
            SHARED.rounds[folder, client] = number
            SHARED.waiting.add((folder, client))
        else:
            SHARED.waiting.discard((folder, client))
        self._hand_over(recorder, number, client, message, found, outward)

    def _hand_over(
        self, recorder: Recorder, number: int, client: str, message: Shareable, found: DXO | None, outward: bool
    ) -> None:
        """Copies of what the message holds, or why it holds nothing that can be recorded."""
        code = message.get_return_code()
        try:
            if code != ReturnCode.OK:
                raise DataError(f"return code {code}")
            read(message)
            if found is None or kind_of(found) == METRICS:
                return
            if kind_of(found) not in (WEIGHTS, CHANGES):
                raise DataError(f"the message is of kind {kind_of(found)}")
            tensors = tensors_of(found)
        except DataError as error:
            SHARED.do(recorder, number, partial(recorder.failed, number, client, str(error)))
            return
        said = {str(key): value for key, value in (found.meta or {}).items() if plain(value)}
        if outward:
            act = partial(recorder.sent, number, tensors, client=client, config=said)
        else:
            kind: UpdateKind = "delta" if kind_of(found) == CHANGES else "weights"
            examples = self._examples(found)
            act = partial(recorder.received, number, client, tensors, examples=examples, kind=kind, config=said)
        SHARED.do(recorder, number, act)

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """At the end of the run all is written before FLARE ends the process."""
        if event_type == EventType.END_RUN:
            SHARED.close()

    def _examples(self, found: DXO) -> int | None:
        told: Any = found.get_meta_prop(self.examples_key)
        if isinstance(told, bool) or not isinstance(told, int | float) or told < 1:
            return None
        return int(told) * self.images_per_step
