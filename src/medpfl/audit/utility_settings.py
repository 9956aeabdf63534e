"""The key `utility` of a spec."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from medpfl.core.config import STRICT
from medpfl.federation.federated import FederationConfig


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Utility(FederationConfig):
    """How utility is measured: `utility: {rounds: 20, clients: 4, partition: iid, seeds: 3}`, or `utility: true`."""

    seeds: Annotated[int, Field(ge=1, description="runs that differ in weights, partition, orders and noise")] = 3
