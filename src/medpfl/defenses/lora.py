"""LoRA: small factors beside frozen layers are trained and sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from medpfl.core.config import STRICT
from medpfl.core.domain import GlobalModel, Recipe
from medpfl.core.mechanisms import Adapters, Mechanism
from medpfl.core.seeding import generator
from medpfl.defenses.base import DEFENSES, Defense
from medpfl.models.adapters import FACTORS, adaptable, with_adapters


@DEFENSES.register(
    "lora",
    summary="layers are frozen; low-rank factors beside them, and the last layer, are trained and sent",
    paper="Hu et al.: LoRA: Low-Rank Adaptation of Large Language Models, ICLR 2022 (arXiv 2106.09685)",
    limits="at the start B = 0, so A's gradient is zero and B's shows rank numbers per unit and place; later both show "
    "more; a last layer that is sent shows its input features exactly; no privacy guarantee",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class Lora(Defense):
    """Every dense or convolution layer W x gets scale * B A x added with B = 0, A random and known to everybody.

    Only A and B are trained and sent, and, with `head: full` as fine-tuning usually does, the last of these layers as
    a whole. Norms, biases and all else are frozen. Layers that share tensors, grouped convolutions and others are left
    as they are, frozen.
    """

    adaptive_attack: ClassVar[Mapping[str, Any]] = {"name": "idlg", "distance": "likelihood", "total_variation": 1e-2}

    rank: Annotated[int, Field(ge=1, description="rank of the factors")] = 4
    alpha: Annotated[float | None, Field(gt=0, description="scale times rank; by default the rank, so scale 1")] = None
    layers: Annotated[str, Field(description="pattern of the layers that get factors, for instance body.*")] = "*"
    head: Annotated[
        Literal["full", "factors", "frozen"],
        Field(description="the last layer: trained and sent as a whole, as factors, or not at all"),
    ] = "full"
    b_spread: Annotated[
        float, Field(ge=0, description="standard deviation of B: 0 as in the first round, above as in a later one")
    ] = 0.0

    def model(self, model: GlobalModel) -> GlobalModel:
        """The model with factors; the same for everybody who calls it."""
        *body, last = adaptable(model)
        chosen = [path for path in adaptable(model, self.layers) if path in body or self.head == "factors"]
        scale = 1.0 if self.alpha is None else self.alpha / self.rank
        stream = generator("lora", model.name, self.rank)
        adapted = with_adapters(
            model, chosen, rank=self.rank, scale=scale, full=[last] if self.head == "full" else [], generator=stream
        )
        drawn = {
            name: (self.b_spread * torch.randn(tensor.shape, dtype=torch.float64, generator=stream)).to(tensor)
            for name, tensor in adapted.parameters.items()
            if name.endswith(FACTORS[1])
        }
        return replace(adapted, parameters={**adapted.parameters, **drawn}) if self.b_spread else adapted

    def mechanism(self) -> Mechanism:
        """Factors of this rank."""
        return Adapters(self.rank)

    def refusals(self, model: GlobalModel, recipe: Recipe) -> list[str]:
        """Models without layers to adapt; nothing where the model has its factors already."""
        if any(name.endswith(FACTORS) for name in model.parameters):
            return []
        layers = adaptable(model)
        if not layers:
            return [f"'{model.name}' has no dense or plain convolution layer that factors could be put beside"]
        if self.head == "full" or [path for path in adaptable(model, self.layers) if path != layers[-1]]:
            return []
        if self.head == "factors" and layers[-1] in adaptable(model, self.layers):
            return []
        return [f"layers: no layer of '{model.name}' is named like '{self.layers}'; it has {', '.join(layers[:6])}"]

    def warnings(self) -> tuple[str, ...]:
        """No guarantee."""
        return (
            "LoRA sends fewer numbers but bounds nothing about them: there is no formal guarantee, and what is measured "
            "holds for the audited attacks only",
        )
