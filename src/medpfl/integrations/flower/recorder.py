"""A strategy around any strategy that records what an honest but curious server sees."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import flwr
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from medpfl.core.errors import DataError
from medpfl.federation.recording import About, Behind, Recorder, Storage
from medpfl.federation.recording.writer import LIMIT
from medpfl.integrations.common.careful import LOGGER, carefully, recorder_or_none_at_all
from medpfl.integrations.flower.records import config_of, copied_arrays, examples_of, metrics_of, tensors_of
from medpfl.integrations.flower.wrapping import WrappingStrategy

LONGEST_REASON = 300
"""Characters of a client's error that are kept."""


class RecordingStrategy(WrappingStrategy):
    """Hands everything on to `strategy` and records it: what was sent in each round, and every client's answer.

    It must be the outermost strategy, around wrappers for differential privacy too, because Flower's accounted wrappers
    refuse strategies that change `aggregate_train`. Training goes on whatever happens to the recording: a full disk, an
    answer that cannot be read, the size limit, or a folder in which somebody else records, end, thin or prevent the
    recording, with a warning. Files are written behind
    the training, of one round at most: what a round brought is on the disk before the next but one starts.

    recorder: a folder, a storage (encrypted or in memory) or a recorder. examples_key: metric that holds the number of
    images. Node numbers are recorded as text.
    """

    def __init__(
        self,
        strategy: Strategy,
        recorder: Recorder | Storage | Path | str,
        *,
        about: About | None = None,
        limit: int = LIMIT,
        examples_key: str = "num-examples",
    ) -> None:
        super().__init__(strategy)
        self._behind = Behind()
        self._asked: set[str] = set()
        self.examples_key = examples_key
        self.recorder = (
            recorder
            if isinstance(recorder, Recorder)
            else recorder_or_none_at_all(recorder, about or About(source=f"flower {flwr.__version__}"), limit)
        )

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The inner strategy's messages, recorded while clients train; what several get is kept once."""
        messages = list(super().configure_train(server_round, arrays, config, grid))
        self._asked = {str(message.metadata.dst_node_id) for message in messages}
        self.wait()
        carefully(self.recorder, server_round, partial(self._sent, server_round, messages))
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Hands the answers on, which are recorded while the next round runs."""
        answers = list(replies)
        for message in answers:
            carefully(self.recorder, server_round, partial(self._received, server_round, message))
        for client in self._asked - {str(message.metadata.src_node_id) for message in answers}:
            self._record(server_round, partial(self.recorder.failed, server_round, client, "no answer came"))
        self._asked = set()
        return super().aggregate_train(server_round, answers)

    def summary(self) -> None:
        """The inner strategy's, and where the recording stands."""
        super().summary()
        LOGGER.info("recording: %s", self.recorder.stopped or "every round")

    def start(self, *arguments: Any, **values: Any) -> Any:
        """Runs all rounds and closes the recording, also where a round raises."""
        with self.recorder:
            try:
                return super().start(*arguments, **values)
            finally:
                self.wait()

    def wait(self) -> None:
        """Until all that was handed over is recorded. `start` does so at its end, and every round for the one before."""
        self._behind.wait()

    def _sent(self, number: int, messages: Sequence[Message]) -> None:
        same: dict[tuple[object, ...], tuple[ArrayRecord, list[str], dict[str, Any]]] = {}
        for message in messages:
            arrays, config = copied_arrays(message), config_of(message)
            key = (tuple((name, id(array.data)) for name, array in arrays.items()), repr(config))
            same.setdefault(key, (arrays, [], config))[1].append(str(message.metadata.dst_node_id))
        for arrays, clients, config in same.values():
            self._record(number, partial(self._keep_sent, number, arrays, clients, config))

    def _keep_sent(self, number: int, arrays: ArrayRecord, clients: list[str], config: dict[str, Any]) -> None:
        self.recorder.sent(number, tensors_of(arrays), client=clients, config=config)

    def _received(self, number: int, message: Message) -> None:
        client = str(message.metadata.src_node_id)
        if message.has_error():
            reason = " ".join((message.error.reason or "no reason").split())[:LONGEST_REASON]
            self._record(number, partial(self.recorder.failed, number, client, f"error {message.error.code}: {reason}"))
            return
        try:
            arrays = copied_arrays(message)
        except DataError as error:
            self._record(number, partial(self.recorder.failed, number, client, str(error)))
            return
        said = {name: value for name, value in metrics_of(message).items() if name != self.examples_key}
        examples = examples_of(message, self.examples_key)
        self._record(number, partial(self._keep_received, number, client, arrays, examples, said))

    def _keep_received(
        self, number: int, client: str, arrays: ArrayRecord, examples: int | None, said: dict[str, Any]
    ) -> None:
        try:
            tensors = tensors_of(arrays)
        except DataError as error:
            self.recorder.failed(number, client, str(error))
            return
        self.recorder.received(number, client, tensors, examples=examples, kind="weights", config=said)

    def _record(self, number: int, act: Callable[[], None]) -> None:
        self._behind.do(partial(carefully, self.recorder, number, act))
