"""What the report knows about the guarantee of a cell's defense."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Guaranteed:
    """What a defense guarantees by its construction, as `cells.csv` has it; None where it was not computed.

    `told` says the noise and per what, or that there is no formal guarantee. `epsilon` may be infinite. `curve`: prior and bound, for other
    priors.
    """

    told: str
    epsilon: float | None = None
    delta: float | None = None
    unit: str = ""
    neighbors: str = ""
    added_by: str = ""
    rounds: int = 0
    accountant: str = ""
    prior: float | None = None
    prior_images: int = 0
    bound: float | None = None
    theorem: str = ""
    observed_rounds: int = 0
    observed_bound: float | None = None
    no_prior_psnr: float | None = None
    remarks: tuple[str, ...] = ()
    curve: tuple[tuple[float, float], ...] = ()

    @property
    def formal(self) -> bool:
        """Whether there is a guarantee at all."""
        return bool(self.unit)
