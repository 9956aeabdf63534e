"""The leakage gate as a filter: a site's last look at its own update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nvflare.apis.dxo import DXO
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable
from torch import Tensor

from medpfl.audit.validation import build
from medpfl.core.errors import InputError, SpecError
from medpfl.federation.guarding import Verdict
from medpfl.guards import LeakageGate
from medpfl.integrations.common.deciding import SEARCHED, received, trained
from medpfl.integrations.flare.agreed import AgreedModel, OwnImages, agreed_recipe
from medpfl.integrations.flare.answers import AnswerFilter
from medpfl.integrations.flare.exchange import CHANGES, kind_of, site_of, tensors_of
from medpfl.integrations.flare.vetting import kept_received


class GateFilter(AnswerFilter, AgreedModel, OwnImages):
    """Reads the site's own update as an attacker would before it leaves, and blocks it if images come back.

    model, image_shape, classes, task: the architecture that was agreed on, as for VettingFilter. images: the images that
    were trained on, in order, a callable by name with `images_arguments` (see `OwnImages.batch`): the site owns the truth, which
    no server has. recipe: how the site trains, for instance {"batch_size": 8, "local_steps": 4, "learning_rate": 0.01}; it
    must be what the job really does, or the gate compares with the wrong step. guard: settings of the leakage gate,
    whose `attacks` are idlg unless it names others. Put it last, so that it sees what is really sent; filters of the job
    still come after it. Raises SpecError for parameters that are wrong.
    """

    what = "leakage_gate"

    def __init__(
        self,
        folder: str,
        model: str,
        image_shape: Sequence[int],
        images: str,
        recipe: Mapping[str, Any],
        classes: int = 2,
        task: str = "single_label",
        images_arguments: Mapping[str, Any] | None = None,
        guard: Mapping[str, Any] | None = None,
        withheld: int = 3,
        rounds: int = 20,
    ) -> None:
        super().__init__(folder)
        self.agree(model, image_shape, classes, task)
        self.own(images, images_arguments, withheld, rounds)
        self.recipe, self.guard = dict(recipe), dict(guard or {})
        self.checking: LeakageGate = build(LeakageGate, {"attacks": SEARCHED, **self.guard}, "guard")
        self.agreed = agreed_recipe(self.recipe)
        for key, value in (("model", model), ("images", images)):
            if not isinstance(value, str) or not value:
                raise SpecError(f"{key}: expected a name, found {value!r}; the gate cannot look without it")

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO | None:
        """The same, if the gate lets it pass."""
        self.decide(fl_ctx, self.limit, lambda: self._verdict(tensors_of(dxo), kind_of(dxo) == CHANGES, fl_ctx))
        return None

    def _verdict(self, found: dict[str, Tensor], changes: bool, context: FLContext) -> Verdict | None:
        number, sent = kept_received(context)
        if unknown := [name for name in found if name not in sent]:
            raise InputError(f"the update holds '{unknown[0]}', which was not received")
        new = {name: sent[name] + tensor for name, tensor in found.items()} if changes else found
        batch = self.batch(site_of(context), number)
        if len(batch) == 0:
            raise InputError("images: the site's callable gave none, so there is nothing to compare with")
        return self.checking.after(trained(received(self.architecture, sent, batch, self.agreed), new, None))
