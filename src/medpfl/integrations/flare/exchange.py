"""Between FLARE's messages and named tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from nvflare.apis.dxo import DXO, DataKind, from_shareable
from nvflare.apis.fl_constant import ReservedKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import ReservedHeaderKey, Shareable
from nvflare.app_common.app_constant import AppConstants
from torch import Tensor

from medpfl.core.domain import Tensors
from medpfl.core.errors import DataError
from medpfl.federation.recording.arrays import as_tensor

WEIGHTS, CHANGES = str(DataKind.WEIGHTS.value), str(DataKind.WEIGHT_DIFF.value)
METRICS = str(DataKind.METRICS.value)

CONTENT = ("DXO", ReservedHeaderKey.HEADERS)
"""All that a message may consist of."""

MOST_VALUES, LONGEST_TEXT = 200, 1000
"""Of plain values beside an update: so many numbers and words, none longer than this."""


def read(message: Shareable) -> DXO:
    """The DXO of a message. Raises DataError where it holds none, or something else beside it.

    FLARE's own `DXOFilter` hands on what is no DXO, so that this has to be asked before.
    """
    try:
        found = from_shareable(message)
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"the message is no DXO ({error})") from None
    others = [str(key) for key in message if key not in CONTENT]
    if others:
        raise DataError(f"the message holds '{others[0]}' beside its DXO")
    return found


def kind_of(found: DXO) -> str:
    """The data kind as text."""
    kind = found.data_kind
    return str(kind.value if isinstance(kind, DataKind) else kind)


def tensors_of(found: DXO) -> dict[str, Tensor]:
    """Copies of the arrays by name, in order and in their own types. Raises DataError for what no tensor can hold."""
    if not isinstance(found.data, Mapping) or not found.data:
        raise DataError("the DXO holds no tensor")
    return {str(name): as_tensor(str(name), value) for name, value in found.data.items()}


def like(tensors: Tensors, found: DXO) -> dict[str, Any]:
    """The tensors as the message had them: NumPy arrays or tensors, under its own names."""
    return {
        name: tensors[str(name)] if isinstance(value, Tensor) else tensors[str(name)].numpy()
        for name, value in found.data.items()
    }


def plain(value: Any, *, most: int = MOST_VALUES) -> bool:
    """Whether a value beside an update is a number, a short word, or a small collection of them.

    >>> plain({"loss": 0.5, "steps": 3}), plain({"images": np.zeros(4)}), plain(list(range(500)))
    (True, False, False)
    """
    return _count(value) <= most


def round_of(message: Shareable, found: DXO | None, context: FLContext) -> int | None:
    """The number of the round, as FLARE counts from 0; None where nobody says."""
    told = message.get_header(AppConstants.CURRENT_ROUND)
    if told is None and found is not None:
        told = found.get_meta_prop(AppConstants.CURRENT_ROUND)
    if told is None:
        told = context.get_prop(AppConstants.CURRENT_ROUND)
    return int(told) if isinstance(told, int | float) else None


def site_of(context: FLContext) -> str:
    """This site's name."""
    return str(context.get_identity_name() or "site")


def peer_of(message: Shareable, context: FLContext) -> str:
    """The name of the site at the other end."""
    peer = context.get_peer_context()
    name = "" if peer is None else peer.get_identity_name()
    return str(name or message.get_peer_prop(ReservedKey.IDENTITY_NAME, "") or "unknown")


def _count(value: Any) -> int:
    """How many plain values it holds; far too many for anything else."""
    if value is None or isinstance(value, bool | int | float | np.integer | np.floating):
        return 1
    if isinstance(value, str):
        return 1 if len(value) <= LONGEST_TEXT else MOST_VALUES + 1
    if isinstance(value, Mapping):
        return 1 + sum(_count(key) + _count(one) for key, one in value.items())
    if isinstance(value, list | tuple):
        return 1 + sum(_count(one) for one in value)
    return MOST_VALUES + 1
