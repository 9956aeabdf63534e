"""A mod that lets nothing leave a site but what an answer is agreed to hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from flwr.app import ArrayRecord, Context, Message, MessageType, RecordDict

from medpfl.core.errors import DataError, MedPFLError
from medpfl.integrations.common.audit_log import AuditLog
from medpfl.integrations.flower.records import arrays_key, refused, tensors_of


@dataclass(frozen=True)
class AnswersMod:
    """Without it an app could send images in an evaluation's answer, in a setting, behind an array, or in an error's words.

    To a train message one record of arrays leaves, with names and shapes that came with the message, written anew; to
    other messages none. Beside them at most `values` numbers and words of at most `characters` characters in all, names
    included, and no bytes. messages: the kinds that are answered at all, `query` is not. Errors leave without their
    reason. For a site's own policy, as the outermost mod; not for SecAgg+, whose messages are bytes.
    """

    messages: tuple[str, ...] = (MessageType.TRAIN, MessageType.EVALUATE)
    values: int = 32
    characters: int = 500
    log: AuditLog = field(default_factory=AuditLog)

    def __call__(self, message: Message, context: Context, call_next: Callable[[Message, Context], Message]) -> Message:
        """The app's answer with nothing beside what was agreed, or an error."""
        kind = str(message.metadata.message_type).partition(".")[0]
        if kind not in self.messages:
            return self._withheld(message, f"messages of the kind '{kind}' are not answered")
        try:
            answer = call_next(message, context)
            if answer.has_error():
                return refused(message)
            answer.content = self._checked(answer, message, kind)
        except MedPFLError as error:
            return self._withheld(message, str(error))
        except Exception as error:  # noqa: BLE001  what an app raises may say anything, so none of it leaves
            return self._withheld(message, f"{type(error).__name__}: {error}")
        return answer

    def _checked(self, answer: Message, message: Message, kind: str) -> RecordDict:
        found = answer.content
        beside = [*found.metric_records.items(), *found.config_records.items()]
        values = [value for _, record in beside for value in record.values()]
        self._check_small([*(name for name, _ in beside), *(key for _, record in beside for key in record)], values)
        content = RecordDict(dict(beside))
        if kind == MessageType.TRAIN:
            content[arrays_key(message)] = self._arrays(answer, message)
        elif found.array_records:
            raise DataError(f"the answer to '{kind}' holds arrays")
        return content

    def _arrays(self, answer: Message, message: Message) -> ArrayRecord:
        sent = tensors_of(message.content.array_records[arrays_key(message)])
        tensors = tensors_of(answer.content.array_records[arrays_key(answer)])
        for name, tensor in tensors.items():
            if (
                name not in sent
                or tensor.shape != sent[name].shape
                or tensor.element_size() > sent[name].element_size()
            ):
                raise DataError(f"the answer holds '{name[:40]}', which did not come, or not in this shape and type")
        return ArrayRecord(tensors)

    def _check_small(self, names: Iterable[str], values: Iterable[Any]) -> None:
        count = characters = 0
        single = [one for value in values for one in (value if isinstance(value, list) else [value])]
        for one in (*names, *single):
            if isinstance(one, bytes):
                raise DataError("the answer holds bytes beside its arrays")
            count += not isinstance(one, str)
            characters += len(one) if isinstance(one, str) else 0
        if count > self.values or characters > self.characters:
            raise DataError(
                f"the answer holds {count} numbers and {characters} characters beside its arrays, more than the "
                f"{self.values} and {self.characters} that were agreed"
            )

    def _withheld(self, message: Message, reason: str) -> Message:
        self.log.decided("answers", "withheld", (reason,))
        return refused(message)
