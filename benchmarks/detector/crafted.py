"""Crafted runs: every attack that prepares models, with parameters drawn for each run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detector.data import drawn
from detector.honest import STAGES, Round, new_model, trained
from medpfl.attacks import ATTACKS
from medpfl.attacks.crafted import CraftedAttack, ServerView
from medpfl.core.domain import Auxiliary, Broadcast, Knowledge, Observation, Recipe, Reconstruction, Update
from medpfl.core.functional import assignment
from medpfl.federation import Plain, SecureSum
from medpfl.metrics.scoring import pairwise_mse

Choices = Mapping[str, Sequence[Any]]

ANY_BODY = ("lenet_idlg", "lenet_dlg", "cnn3", "strided", "lenet5", "all_convolutional", "gated", "mixer")
BINNED = {"bins": (64, 128, 256, 512), "scale": (1.0, 1e-1, 1e-2, 1e-3, 1e-4), "gain": (1.0, 10.0, 30.0)}


@dataclass(frozen=True)
class Family:
    """An attack with what is drawn for every run: its settings and the body, whose stage is drawn as well.

    dead: the run is of a client beside the victim, whose model is dead so that the victim's images stand alone.
    """

    attack: str
    settings: Choices
    bodies: Sequence[str]
    dead: bool = False


FAMILIES: dict[str, Family] = {
    "medleak": Family(
        "medleak",
        {**BINNED, "mode": ("separate", "joint"), "quantiles": ("smoothed", "gaussian"), "balance": (True, False)},
        ANY_BODY,
    ),
    "medleak_dead": Family("medleak", BINNED, ANY_BODY, dead=True),
    "robbing_the_fed": Family(
        "robbing_the_fed",
        {
            **BINNED,
            "variant": ("cumulative", "sparse"),
            "query": ("mean", "dct", "random"),
            "connection": ("linear", "residual"),
            "quantiles": ("smoothed", "fitted"),
        },
        ANY_BODY,
    ),
    "curious_front": Family(
        "curious_abandon_honesty",
        {
            "place": ("front",),
            "units": (256, 512, 1000),
            "signs": ("independent", "mirrored"),
            "tuning": ("factor", "thresholds"),
            "scale": (0.5, 0.1, 1e-2),
        },
        ANY_BODY,
    ),
    "curious_own": Family(
        "curious_abandon_honesty",
        {
            "place": ("own",),
            "signs": ("independent", "mirrored"),
            "tuning": ("factor", "thresholds"),
            "scale": (0.5, 0.1, 1e-2),
        },
        ("mlp_relu", "mlp_wide"),
    ),
    "loki": Family(
        "loki",
        {"bins": (64, 128, 256), "brightness": ("constant", "bin"), "scale": (1.0, 1e-2, 1e-3), "gain": (1.0, 10.0)},
        ANY_BODY,
    ),
    "fishing": Family(
        "fishing",
        {
            "by": ("class", "feature"),
            "strength": (0.1, 0.5, 2.0),
            "offset": (30.0, 100.0, 1000.0),
            "sharpness": (30.0, 300.0),
            "features": ("all", "one"),
            "iterations": (10,),
        },
        ANY_BODY,
    ),
    "scale_mia": Family(
        "scale_mia",
        {"steps": (60,), "width": (16,), "scale": (1.0, 1e-1, 1e-2), "encoder": ("trained", "as_sent")},
        ("cnn_fedavg", "strided", "alexnet_small"),
    ),
    "ares": Family(
        "ares",
        {"solver": ("least_squares",), "iterations": (100,), "scale": (1.0, 1e-1, 1e-2, 1e-3)},
        ("strided", "shallow"),
    ),
}


@dataclass(frozen=True)
class CraftedRound:
    """What a client got, and how to find out how much the server reads of its update."""

    round: Round
    attack: CraftedAttack
    broadcast: Broadcast
    clients: int
    detail: str

    def recovered(self, update: Update, generator: torch.Generator) -> float:
        """Share of the client's images above 30 dB, one candidate each; 0 where the model is dead."""
        if self.round.model is not self.broadcast.models[0]:
            return 0.0
        own = self.round
        observation = Observation(
            own.model, update, own.recipe, "malicious_server", knowledge=Knowledge(), broadcast=self.broadcast
        )
        (result,) = self.attack.reconstruct([observation], [generator])
        return recovered_share(own.batch.images, result.images) if isinstance(result, Reconstruction) else 0.0


def crafted_round(family: str, data: str, folder: Path | None, generator: torch.Generator) -> CraftedRound:
    """One run of a family, all of it drawn from `generator`."""
    chosen = FAMILIES[family]

    def one_of(values: Sequence[Any]) -> Any:
        return values[int(torch.randint(len(values), (), generator=generator))]

    settings = {name: one_of(values) for name, values in chosen.settings.items()}
    body, stage, size = one_of(chosen.bodies), one_of(list(STAGES)), one_of((16, 32, 64))
    rate, update = one_of((0.01, 0.1, 1.0)), one_of(("gradient", "delta"))
    draw = drawn(data, folder, size, generator)
    model = trained(new_model(body, draw, generator), draw.batch(draw.others), STAGES[stage] // 2, generator)
    attack = ATTACKS[chosen.attack].item(**settings)
    assert isinstance(attack, CraftedAttack)
    recipe = Recipe(update=update, batch_size=size, learning_rate=rate)
    owned = draw.batch(draw.auxiliary)
    view = ServerView(
        model=model,
        recipe=recipe,
        update=recipe.update,
        channel=SecureSum(clients=2) if chosen.dead else Plain(),
        examples=size,
        threat_model="malicious_server",
        can=attack.needs(),
        knowledge=Knowledge(auxiliary=Auxiliary(owned.images, owned.targets)),
    )
    broadcast = attack.prepare(view, generator)
    sent = broadcast.model(1 if chosen.dead else 0)
    told = " ".join(f"{name}={value}" for name, value in {**settings, "stage": stage, "body": body}.items())
    detail = f"{told} rate={rate:g} update={update}"
    return CraftedRound(Round(sent, draw.batch(draw.client), recipe, model), attack, broadcast, view.clients, detail)


def recovered_share(private: Tensor, found: Tensor, psnr: float = 30.0) -> float:
    """Share of private images with a mean squared error of at most that of `psnr`, one candidate each."""
    if not len(found):
        return 0.0
    errors = pairwise_mse(private.double(), found.double())
    rows, columns = assignment(errors)
    return int((errors[rows, columns] < 10 ** (-psnr / 10)).sum()) / len(private)
