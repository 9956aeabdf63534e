"""How often a client may withhold before it stops taking part, so that nobody learns from asking again and again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field
from pydantic.dataclasses import dataclass

from medpfl.core.config import STRICT


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WithholdLimit:
    """When a client stops taking part."""

    withheld: Annotated[int, Field(ge=1, description="so many withheld rounds")] = 3
    rounds: Annotated[int, Field(ge=1, description="among so many of the last rounds that it took part in")] = 20

    def __post_init__(self) -> None:
        if self.withheld > self.rounds:
            raise ValueError(
                f"withheld: {self.withheld} of rounds: {self.rounds} can never be reached; make rounds larger"
            )


def may_take_part(history: Sequence[bool], limit: WithholdLimit = WithholdLimit()) -> bool:
    """Whether a client goes on: history says of each round that it took part in, oldest first, if it withheld.

    That a round was withheld tells a server one bit about the client's images under a model of the server's choice.
    Rounds in which the client does not take part are not appended, so once it has stopped it stays away until a person
    has looked at the reasons and starts a new history.

    >>> limit = WithholdLimit(withheld=2, rounds=4)
    >>> may_take_part([False, True, False, False], limit), may_take_part([False, True, False, True], limit)
    (True, False)
    """
    return sum(history[-limit.rounds :]) < limit.withheld
