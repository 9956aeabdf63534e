"""A strategy that sends crafted parameters, to test one's own clients' guards."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from flwr.app import ArrayRecord, ConfigRecord, Message
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from medpfl.core.domain import Tensors
from medpfl.integrations.flower.records import arrays_key, tensors_of, with_tensors
from medpfl.integrations.flower.wrapping import WrappingStrategy

Craft = Callable[[int, int, Tensors], Tensors | None]
"""Round, node number and the tensors that an honest server would send -> those that it sends; None: as they are."""


class CraftedStrategy(WrappingStrategy):
    """Hands everything on to `strategy` but sends each node what `craft` makes of the model.

    For drills of one's own clients only: an attacker's server could run the same few lines. Architectures cannot be
    changed this way, because a Flower client builds its model from its own app; send a crafted app for that.
    """

    def __init__(self, strategy: Strategy, craft: Craft) -> None:
        super().__init__(strategy)
        self.craft = craft

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """The inner strategy's messages with other tensors."""
        changed = []
        for message in super().configure_train(server_round, arrays, config, grid):
            tensors = tensors_of(message.content.array_records[arrays_key(message)])
            crafted = self.craft(server_round, message.metadata.dst_node_id, tensors)
            changed.append(message if crafted is None else with_tensors(message, crafted))
        return changed
