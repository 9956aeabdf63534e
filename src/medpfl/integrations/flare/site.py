"""What the filters of one site share: they fail closed, tell the server nothing, and write down why."""

from __future__ import annotations

import contextlib
import json
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from nvflare.apis.dxo import DXO
from nvflare.apis.dxo_filter import DXOFilter
from nvflare.apis.filter import ContentBlockedException
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable

from medpfl.core.errors import MedPFLError, SpecError, StoreError
from medpfl.core.files import make_private_folder, unwritable, write_atomically
from medpfl.federation.guarding import Verdict
from medpfl.guards.participation import WithholdLimit
from medpfl.integrations.common.audit_log import AuditLog
from medpfl.integrations.common.deciding import Decisions, closed
from medpfl.integrations.flare.exchange import CHANGES, WEIGHTS, kind_of, site_of

WITHHELD = "withheld"
"""All that FLARE's own logs say, since a job may have them streamed to the server."""

LOG, HISTORY = "guards.jsonl", "history.json"
"""Files in the site's folder."""


class SiteFilter(DXOFilter):
    """Base of the filters at a site.

    Whatever it cannot read, does not know or breaks down over is blocked: FLARE answers the server an error code without
    a reason, and the reason stands in `guards.jsonl` in the site's `folder`, where `{site}` stands for the site's name.
    Messages are never written into: FLARE may send one to many.
    """

    what = "filter"
    """Who decides, in the log."""

    def __init__(self, folder: str) -> None:
        super().__init__(supported_data_kinds=[WEIGHTS, CHANGES], data_kinds_to_filter=None)
        if not isinstance(folder, str) or not folder:
            raise SpecError(f"folder: expected the path of a folder of the site's own, found {folder!r}")
        self.folder = folder

    def process(self, shareable: Shareable, fl_ctx: FLContext) -> Shareable:
        """The message with what `process_dxo` makes of it. Raises ContentBlockedException without a reason."""
        reason = None
        try:
            own = _copied(shareable)
            checked = self.checked(own, fl_ctx)
            return own if checked is None else super().process(checked, fl_ctx)
        except ContentBlockedException:
            pass  # decided, and written down
        except MedPFLError as error:
            reason = str(error)
        except Exception as error:  # noqa: BLE001  whatever happens, nothing passes unseen; the reason stands in the log
            reason = f"it broke down ({type(error).__name__}: {error})"
        if reason is not None:
            with contextlib.suppress(StoreError):  # what cannot even be written down is blocked all the same
                self.log(fl_ctx).decided(self.what, "withheld", (reason,))
        raise ContentBlockedException(WITHHELD)

    @abstractmethod
    def checked(self, message: Shareable, fl_ctx: FLContext) -> Shareable | None:
        """The message if `process_dxo` is to look at it; None to hand it on as it is. Raises what blocks it."""

    @abstractmethod
    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO | None:
        """What is handed on in place of the DXO; None: the same."""

    def log(self, context: FLContext) -> AuditLog:
        """The site's own log. Raises StoreError where its folder cannot be made."""
        return AuditLog(self.own_folder(context) / LOG)

    def own_folder(self, context: FLContext) -> Path:
        """The site's folder, private."""
        folder = Path(self.folder.replace("{site}", site_of(context)))
        try:
            make_private_folder(folder)
        except OSError as error:
            raise unwritable(folder, error) from None
        return folder

    def decide(self, context: FLContext, limit: WithholdLimit, look: Callable[[], Verdict | None]) -> None:
        """Notes what a guard finds. Raises ContentBlockedException where that ends the round, or too many ended."""
        decisions = Decisions(self.log(context), limit, FileHistory(self.own_folder(context) / HISTORY))
        if decisions.stays_away(self.what) or decisions.ends(closed(self.what, look)):
            raise ContentBlockedException(WITHHELD)


@dataclass(frozen=True)
class FileHistory:
    """Which rounds were withheld, in a file: a new job does not begin a new history."""

    path: Path

    def read(self) -> list[bool]:
        """What the file remembers. Raises StoreError where it is damaged: it must not begin anew."""
        try:
            found = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as error:
            raise StoreError(
                f"{self.path}: the history cannot be read ({error}); look at the log and delete it"
            ) from None
        if not isinstance(found, list):
            raise StoreError(f"{self.path}: is no history; look at the log and delete it")
        return [bool(entry) for entry in found]

    def write(self, withheld: list[bool]) -> None:
        """Replaces the file."""
        write_atomically(self.path, json.dumps(withheld).encode())


def known_kind(found: DXO, *kinds: str) -> DXO:
    """The DXO if it is of one of these kinds and holds something. Raises SpecError.

    FLARE's own `DXOFilter` hands on what holds nothing, as it hands on the kinds that it does not know.
    """
    if not found.data:
        raise SpecError("the DXO holds no tensor")
    if kind_of(found) not in kinds:
        raise SpecError(f"the DXO is of kind {kind_of(found)}, which is not looked at; known are {', '.join(kinds)}")
    return found


def _copied(message: Shareable) -> Shareable:
    """The message with a top level and headers of its own; nothing below is ever written into."""
    if not isinstance(message, Shareable):
        raise SpecError(f"expected a message, found {type(message).__name__}")
    own = Shareable()
    own.update(message)
    headers = message.get("__headers__")
    own["__headers__"] = dict(headers) if isinstance(headers, Mapping) else {}
    return own
