"""Between Flower's messages and named tensors."""

from __future__ import annotations

import math
import struct
import tokenize
import zipfile
import zlib
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Error, Message, RecordDict
from torch import Tensor

from medpfl.core.domain import Tensors
from medpfl.core.errors import DataError

WITHHELD = "withheld"
"""All that a server learns of a client that sends nothing."""

ERROR_CODE = 451
"""Code of the error in place of a withheld update."""

UNREADABLE = (
    TypeError,
    ValueError,
    KeyError,
    AttributeError,
    RuntimeError,
    OverflowError,
    EOFError,
    OSError,
    MemoryError,
    SyntaxError,
    struct.error,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
)
"""What NumPy and PyTorch raise on bytes that are no array: a sender may put anything there."""


def arrays_key(message: Message) -> str:
    """Key of the one array record of a message. Raises DataError where there is none, or more than one."""
    keys = list(message.content.array_records)
    if len(keys) != 1:
        raise DataError(f"a message with one array record is expected, found {len(keys)}")
    return str(keys[0])


def copied_arrays(message: Message) -> ArrayRecord:
    """The one array record of a message, which stays as it is where others change the message. Raises DataError."""
    return ArrayRecord(dict(message.content.array_records[arrays_key(message)]))


def tensors_of(record: ArrayRecord) -> dict[str, Tensor]:
    """The arrays by name, in order and in their own types. Raises DataError for what no tensor can hold."""
    tensors: dict[str, Tensor] = {}
    for name, array in record.items():
        try:
            tensors[str(name)] = torch.from_numpy(np.asarray(array.numpy(), order="C"))
        except UNREADABLE as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(f"array '{name}' of the message cannot be read ({reason})") from None
    return tensors


def with_tensors(message: Message, tensors: Tensors) -> Message:
    """The message with these tensors in place of its arrays. Messages may share their content, so it is not written into."""
    content = RecordDict(dict(message.content))
    content[arrays_key(message)] = ArrayRecord(dict(tensors))
    message.content = content
    return message


def metrics_of(message: Message) -> dict[str, Any]:
    """All metrics that a message carries in clear."""
    return {str(name): value for record in message.content.metric_records.values() for name, value in record.items()}


def config_of(message: Message) -> dict[str, Any]:
    """All settings that a message carries, bytes left out."""
    return {
        str(name): value
        for record in message.content.config_records.values()
        for name, value in record.items()
        if not isinstance(value, bytes) and not (isinstance(value, list) and value and isinstance(value[0], bytes))
    }


def examples_of(message: Message, key: str = "num-examples") -> int | None:
    """How many images the client says that it trained on; None if it does not."""
    value = metrics_of(message).get(key)
    return int(value) if isinstance(value, int | float) and math.isfinite(value) and value >= 1 else None


def refused(message: Message) -> Message:
    """What a client answers that sends nothing: an error without any reason."""
    return Message(Error(code=ERROR_CODE, reason=WITHHELD), reply_to=message)
