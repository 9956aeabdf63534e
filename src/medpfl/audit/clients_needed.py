"""How many clients with how many images a data entry must have for the cells of an audit."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from medpfl.audit.grid import Cell


@dataclass(frozen=True)
class ClientsNeeded:
    """What a data entry must have: private images per client, and bystanders beside a victim."""

    images: int = 1
    bystanders: int = 0


def clients_needed(cells: Iterable[Cell]) -> dict[str, ClientsNeeded]:
    """Data id -> the most that any of its recipes and channels needs."""
    needed: dict[str, ClientsNeeded] = {}
    for cell in cells:
        known = needed.get(cell.dataset.id, ClientsNeeded())
        needed[cell.dataset.id] = ClientsNeeded(
            images=max(known.images, cell.recipe.recipe.private_images),
            bystanders=max(known.bystanders, cell.channel.channel.client_count - 1),
        )
    return needed
