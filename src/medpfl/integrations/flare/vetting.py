"""Filters of what comes: vetting of the model, and keeping it for the filters of the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nvflare.apis.dxo import DXO
from nvflare.apis.fl_constant import ReturnCode
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from torch import Tensor

from medpfl.audit.validation import build
from medpfl.core.errors import DataError, SpecError
from medpfl.federation.guarding import Received
from medpfl.guards import VettingGuard
from medpfl.integrations.common.deciding import received
from medpfl.integrations.flare.agreed import AgreedModel, OwnImages, agreed_recipe
from medpfl.integrations.flare.exchange import WEIGHTS, read, round_of, site_of, tensors_of
from medpfl.integrations.flare.site import SiteFilter, known_kind

RECEIVED = "medpfl.received"
"""Key in the context of the task: round and tensors that came."""


class ReceivedFilter(SiteFilter):
    """Keeps what came for the filters of the answer; looks at nothing.

    Needed in `task_data_filters` where no VettingFilter stands there. folder: see `SiteFilter`.
    """

    what = "received"

    def checked(self, message: Shareable, fl_ctx: FLContext) -> Shareable:
        """A model that came from the server."""
        if message.get_return_code() != ReturnCode.OK:
            raise DataError("the task carries a return code, which only answers have")
        known_kind(read(message), WEIGHTS)
        return message

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO | None:
        """The same, kept."""
        kept = (round_of(shareable, dxo, fl_ctx), tensors_of(dxo))
        fl_ctx.set_prop(RECEIVED, kept, private=True, sticky=False)
        return None


class VettingFilter(ReceivedFilter, AgreedModel, OwnImages):
    """Looks at the model that came before anything is trained on it, as `medpfl vet` does.

    model: name in the zoo or factory `package.module:callable` of the architecture that was agreed on, whose tensors are
    never used; image_shape (C, H, W), classes and task of it. images: the site's own, a callable by name (see
    `OwnImages.batch`), with `images_arguments`; drawn ones are taken where it is empty. guard: settings of the vetting
    guard. After `withheld` withheld rounds among `rounds` the site stays away until somebody has looked at the log and
    deleted the history. Raises SpecError for parameters that are wrong.
    """

    what = "vetting"

    def __init__(
        self,
        folder: str,
        model: str,
        image_shape: Sequence[int],
        classes: int = 2,
        task: str = "single_label",
        images: str = "",
        images_arguments: Mapping[str, Any] | None = None,
        guard: Mapping[str, Any] | None = None,
        withheld: int = 3,
        rounds: int = 20,
    ) -> None:
        super().__init__(folder)
        self.agree(model, image_shape, classes, task)
        self.own(images, images_arguments, withheld, rounds)
        self.guard = dict(guard or {})
        self.checking: VettingGuard = build(VettingGuard, self.guard, "guard")
        if not self.model:
            raise SpecError("model: name the architecture that was agreed on; nothing can be vetted without it")

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO | None:
        """The same, if the guard lets it pass."""
        self.decide(
            fl_ctx,
            self.limit,
            lambda: self.checking.before(self._received(tensors_of(dxo), round_of(shareable, dxo, fl_ctx), fl_ctx)),
        )
        return super().process_dxo(dxo, shareable, fl_ctx)

    def _received(self, tensors: Mapping[str, Tensor], number: int | None, context: FLContext) -> Received:
        batch = self.batch(site_of(context), number) if self.images else None
        return received(self.architecture, tensors, batch, agreed_recipe({}))


def kept_received(context: FLContext) -> tuple[int | None, dict[str, Tensor]]:
    """Round and tensors that came with this task. Raises DataError where no filter kept them."""
    kept = context.get_prop(RECEIVED)
    if kept is None:
        raise DataError(
            "what came with the task was not kept: put a VettingFilter or a ReceivedFilter among the task_data_filters"
        )
    number, tensors = kept
    return number, dict(tensors)
