"""The project's defenses as a filter: what a site's answer becomes before it leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nvflare.apis.dxo import DXO, MetaKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.shareable import Shareable

from medpfl.audit.entry_parsing import defense_entry
from medpfl.core.domain import ClientState
from medpfl.core.errors import SpecError
from medpfl.integrations.common.defending import check_outside_training, defended
from medpfl.integrations.flare.agreed import AgreedModel
from medpfl.integrations.flare.answers import AnswerFilter
from medpfl.integrations.flare.exchange import CHANGES, kind_of, like, tensors_of
from medpfl.integrations.flare.vetting import kept_received


class DefenseFilter(AnswerFilter, AgreedModel):
    """Applies a defense of updates (noise, clipping, compression, sharing less) to weights or changes of weights.

    defense: as in a spec, for instance {"name": "gaussian", "std": 0.01} or {"compose": [{"name": "clip"}, ...]}. Trainable
    tensors, batch-norm buffers and counters are kept apart: with the `model` that was agreed on (see VettingFilter) as
    it says, else by names and types. Names that did not come with the task are blocked. seed: for tests; without it
    every round draws fresh randomness from the operating system. What a defense remembers from round to round lives as
    long as the job's process at the site. Raises SpecError for parameters that are wrong and for defenses that work inside
    training.
    """

    what = "defense"

    def __init__(
        self,
        folder: str,
        defense: Mapping[str, Any],
        model: str = "",
        image_shape: Sequence[int] = (),
        classes: int = 2,
        task: str = "single_label",
        seed: int | None = None,
    ) -> None:
        super().__init__(folder)
        if not isinstance(defense, Mapping):
            raise SpecError(f"defense: expected a mapping such as {{name: gaussian, std: 0.01}}, found {defense!r}")
        self.defense = dict(defense)
        self.agree(model, image_shape, classes, task)
        self.seed = seed
        self.applied: Any = defense_entry(self.defense, "defense", Path()).defense
        self.state = ClientState()
        check_outside_training(self.applied, "a filter")

    def process_dxo(self, dxo: DXO, shareable: Shareable, fl_ctx: FLContext) -> DXO:
        """Another DXO with the defended update, and the meta as it was."""
        _, sent = kept_received(fl_ctx)
        found = tensors_of(dxo)
        if unknown := [name for name in found if name not in sent]:
            raise SpecError(f"the update holds '{unknown[0]}', which was not received, so its change is unknown")
        result, self.state = defended(
            self.applied,
            sent,
            found,
            self.state,
            model=self.architecture if self.model else None,
            kind="delta" if kind_of(dxo) == CHANGES else "weights",
            seed=self.seed,
        )
        self.log(fl_ctx).decided(self.what, "passed", (type(self.applied).__name__,))
        meta = {key: value for key, value in (dxo.meta or {}).items() if key != MetaKey.FILTER_HISTORY}
        return DXO(dxo.data_kind, data=like(result, dxo), meta=meta)  # the base class adds the history
