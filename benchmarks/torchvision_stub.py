"""Lets breaching import torchvision where its compiled operators are missing (a CPU wheel beside another PyTorch).

Only image detection uses these operators; gradient inversion calls none of them.
"""

from __future__ import annotations

import importlib
import re

import torch

LIBRARY = torch.library.Library("torchvision", "FRAGMENT")

MISSING = re.compile(r"operator torchvision::(\w+) does not exist")


def make_torchvision_importable() -> tuple[str, ...]:
    """Imports torchvision, declaring operators that it misses; gives their names, none where it imports as it is.

    A declared operator has no kernel, so that calling it raises.
    """
    declared: list[str] = []
    while True:
        try:
            importlib.import_module("torchvision")
        except RuntimeError as error:
            found = MISSING.search(str(error))
            if found is None or found[1] in declared:
                raise
            declared.append(found[1])
            LIBRARY.define(f"{found[1]}(Tensor[] tensors) -> Tensor")
        else:
            return tuple(declared)
