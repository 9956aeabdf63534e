"""What a defense guarantees by its construction, as plain data: `medpfl.metrics` turns it into epsilons and bounds.

A guarantee lists the noisy releases of one round in units of what one record can change, and says whose record.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Unit = Literal["image", "client", "weight"]
"""What is protected: one image of a client, all that a client holds, or one number that is sent."""

Neighbors = Literal["add_or_remove", "zero_out", "replace"]
"""How two data sets differ that must look alike: by one record more, by one record whose contribution is put to zero,
or by one record in place of another."""

NoiseKind = Literal["gaussian", "laplace", "randomized_response"]


@dataclass(frozen=True)
class Release:
    """Equal noisy releases within one round.

    kind, scale: `gaussian`: standard deviation over L2 sensitivity (the noise multiplier); `laplace`: scale b over L1
    sensitivity; `randomized_response`: the epsilon of one release. sampling_rate: the probability with which a record
    takes part, drawn anew and independently for every release; 1 where it always does. count: how often in a round.
    decay, floor: in round t, counted from 0, the scale is max(scale * decay^t, floor).
    """

    kind: NoiseKind
    scale: float
    sampling_rate: float = 1.0
    count: int = 1
    decay: float = 1.0
    floor: float = 0.0

    def in_round(self, number: int) -> float:
        """The scale in the round with this number, counted from 0.

        >>> Release("gaussian", 4.0, decay=0.5, floor=1.5).in_round(2)
        1.5
        """
        return max(self.scale * self.decay**number, self.floor)


@dataclass(frozen=True)
class Guarantee:
    """What one round releases about one unit.

    releases: all of them, composed. added_by: who adds the noise; nobody who sees the update before is held off.
    remarks: what the guarantee leaves out, in plain sentences.
    """

    unit: Unit
    neighbors: Neighbors
    releases: tuple[Release, ...]
    added_by: Literal["client", "server"] = "client"
    remarks: tuple[str, ...] = ()
