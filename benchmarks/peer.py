"""breaching's preset `invertinggradients` (Geiping et al. 2020) on one image, through its own attacker."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torchvision_stub
from torch import Tensor, nn


@dataclass(frozen=True)
class Peer:
    """An attacker of breaching with what it is told about one victim: gradients of one image, batch norm in eval mode."""

    attacker: Any
    payload: list[dict[str, Any]]
    shared: list[dict[str, Any]]

    def reconstruct(self) -> tuple[Tensor, Tensor, list[float]]:
        """Image (1, C, *spatial), label (1,) and the objective after each iteration, from a fresh random start."""
        with contextlib.redirect_stdout(io.StringIO()):
            found, stats = self.attacker.reconstruct(self.payload, self.shared, {})
        return found["data"].detach(), found["labels"], list(stats["Trial_0_Val"])


def make_peer(
    net: nn.Module,
    gradients: Sequence[Tensor],
    shape: tuple[int, ...],
    classes: int,
    settings: Sequence[str],
    labels: Tensor | None = None,
) -> Peer:
    """The attacker with overridden settings such as `optim.max_iterations=300`; infers the label unless it is given."""
    torchvision_stub.make_torchvision_importable()
    with contextlib.redirect_stdout(io.StringIO()):
        breaching: Any = __import__("breaching")
        config = breaching.get_attack_config("invertinggradients", list(settings))
    setup = {"dtype": torch.float, "device": next(net.parameters()).device}
    attacker = breaching.attacks.prepare_attack(net, nn.CrossEntropyLoss(), config, setup)
    channels = shape[0]
    metadata = SimpleNamespace(
        shape=shape, mean=[0.0] * channels, std=[1.0] * channels, modality="vision", classes=classes
    )
    buffers = [buffer.clone() for buffer in net.buffers()]
    payload = [{"parameters": list(net.parameters()), "buffers": buffers, "metadata": metadata}]
    told = {"num_data_points": 1, "labels": labels, "local_hyperparams": None}
    return Peer(attacker, payload, [{"gradients": list(gradients), "buffers": None, "metadata": told}])
