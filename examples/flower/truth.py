"""What the clients of a recording held, for those who own the images: `medpfl replay --truth` reads it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from brain.task import client_images, held_out, initial_model, round_images, train
from PIL import Image

from medpfl.federation.recording import Recorded, Recording, read_recording

COMPARED = 8
"""Rounds by which a node is told from the others."""


def write_truth(recording: Path, settings: Mapping[str, Any]) -> None:
    """Writes `NAME-truth` beside the recording: one file per client and round, under the names of the nodes.

    Nodes have random numbers, so a node is found by training the images of each partition again, over its first rounds
    together: noise may hide in one round what it does not hide in many. An aggregate has the images of all clients.
    """
    found, truth = read_recording(recording), recording.with_name(f"{recording.name}-truth")
    shutil.rmtree(truth, ignore_errors=True)
    truth.mkdir(mode=0o700)
    everybody = range(int(settings["clients"]))
    for client in sorted({update.client for update in found.updates}):
        updates = [update for update in found.updates if update.client == client]
        partitions = list(everybody)
        if client != "aggregate":
            some = updates[:COMPARED]
            partitions = [
                min(everybody, key=lambda one: sum(_distance(found, update, one, settings) for update in some))
            ]
        for update in updates:
            parts = [_held(partition, update.round, settings) for partition in partitions]
            np.savez(
                truth / f"{client}-round-{update.round}.npz",
                images=torch.cat([images for images, _ in parts]).numpy(),
                labels=torch.cat([labels for _, labels in parts]).numpy(),
            )


def write_pool(folder: Path, settings: Mapping[str, Any]) -> None:
    """The server's own images as PNG, one folder per class: what a curious server knows of such images anyway."""
    images, labels = held_out(str(settings["data"]), int(settings["seed"]))
    shutil.rmtree(folder, ignore_errors=True)
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        place = folder / ("tumor" if int(label) else "none")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray((image[0] * 255).round().to(torch.uint8).numpy()).save(place / f"{index:03d}.png")


def _held(partition: int, number: int, settings: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = client_images(str(settings["data"]), partition, int(settings["images"]), int(settings["seed"]))
    return round_images(images, labels, number, int(settings["batch-size"]) * int(settings["local-steps"]))


def _distance(found: Recording, update: Recorded, partition: int, settings: Mapping[str, Any]) -> float:
    """Squared distance between an update and the one that the partition's images make of the same model."""
    sent = found.sent_to(update)
    if sent is None:
        return 0.0
    model = initial_model()
    model.load_state_dict(dict(sent.tensors))
    train(
        model, *_held(partition, update.round, settings), int(settings["batch-size"]), float(settings["learning-rate"])
    )
    state = model.state_dict()
    return sum(float((state[name] - one).square().sum()) for name, one in update.tensors.items())
