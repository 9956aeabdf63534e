"""The leakage gate: a client's last look at its own update before it is sent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from medpfl.attacks.updates import gradient_view
from medpfl.core.config import STRICT
from medpfl.core.domain import GlobalModel, Observation
from medpfl.federation.changes import sent_change
from medpfl.federation.guarding import LEVELS, Level, Trained, Verdict
from medpfl.guards.base import GUARDS, Guard
from medpfl.guards.isolation import distinct
from medpfl.guards.layer_views import layer_views
from medpfl.guards.search import search, searching_attacks
from medpfl.guards.self_test import LayerFinding, SelfTest, Thresholds, self_test
from medpfl.guards.signs import relative_changes, share_of_dying_units, surplus_loss, thrown_alone

FEWEST_SAMPLES = 12
"""Of fewer samples every layer gives back most, so that nothing tells a crafted one."""

CHAIN_SHARE = 0.25
"""Bins give back at least this share, or they do not fit the images."""

CHAIN_CROSSING = 0.02
"""And hardly any of its units cross; images at the very edge of a bin may."""

Finding = tuple[Level, str]


@GUARDS.register(
    "leakage_gate",
    summary="a client reads its own update as an attacker would and withholds it if its own images come back",
    limits="without `attacks` closed forms only, while gradient matching finds images that these do not; with them a small "
    "budget, so a server with a larger one may find more: audit that with `medpfl audit`; one or two images in a batch "
    "come back from every dense first layer, crafted or not; the training code must be the client's own",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class LeakageGate(Guard):
    """The client owns the truth, so it needs no guess about the attacker.

    `leaks`: more images come back than `images` allows, by the read-out self-test or by one of `attacks`, which spend a
    budget of gradient evaluations on the update and own neither images nor labels. `crafted`: beyond that a layer gives
    back far more than a freshly drawn one would of the same inputs, or does it with units that sort images like bins;
    or one round of training changed a weight by more than `change` times its size, and most others hardly. `unusable`:
    it changed most of them so, or to numbers that are not finite; such an update is withheld as well. Units that die and
    a loss that does not beat the class prior are told.
    """

    withhold: Annotated[
        Literal["leaks", "crafted"],
        Field(description="what ends the round: images that come back, or only the signs of a crafted model"),
    ] = "leaks"
    images: Annotated[int, Field(ge=0, description="so many private images may come back")] = 0
    correlation: Annotated[
        float, Field(gt=0, lt=1, description="an image has come back from this correlation on, whatever its brightness")
    ] = 0.95
    psnr: Annotated[
        float, Field(gt=0, description="and from this PSNR on (dB), after the best brightness and contrast")
    ] = 25.0
    attacks: Annotated[
        tuple[str, ...],
        Field(description="attacks that are run on the update with their quick settings, e.g. [idlg, gradinv]"),
    ] = ()
    most_images: Annotated[
        int, Field(ge=1, description="updates of more images are read in closed form only, whatever `attacks` says")
    ] = 16
    excess: Annotated[
        float, Field(gt=0, lt=1, description="crafted: share of samples beyond what a freshly drawn layer gives back")
    ] = 0.5
    change: Annotated[
        float,
        Field(
            description="largest change of a weight before the last layer, in units of its own size: crafted if most "
            "others hardly change, else unusable",
            gt=0,
        ),
    ] = 10.0

    def __post_init__(self) -> None:
        """Refuses attacks that no honest server could run."""
        searching_attacks(self.attacks)

    def after(self, trained: Trained) -> Verdict:
        """What the update gives away and whether the model looks crafted, and whether that ends the round."""
        if not all(bool(torch.isfinite(tensor).all()) for tensor in trained.update.trainable.values()):
            return Verdict("leakage_gate", "unusable", True, ("the update holds numbers that are not finite",))
        found = sorted(self._findings(trained), key=lambda finding: -LEVELS.index(finding[0]))
        level = found[0][0] if found else "passed"
        withholds = level == self.withhold or any(one in ("crafted", "unusable") for one, _ in found)
        return Verdict("leakage_gate", level, withholds, tuple(reason for _, reason in found))

    def _findings(self, trained: Trained) -> Iterator[Finding]:
        received, recipe = trained.received, trained.received.recipe
        test = self_test(
            received.model,
            gradient_view(Observation(received.model, trained.update, recipe, "client")).tensors,
            received.batch,
            steps=trained.steps if len(trained.steps) > 1 else (),
            batch_norm=recipe.batch_norm,
            thresholds=Thresholds(correlation=self.correlation, psnr=self.psnr),
        )
        yield from self._read(test)
        yield from self._searched(trained)
        yield from self._shaken(trained)

    def _read(self, test: SelfTest) -> Iterator[Finding]:
        if test.returned > self.images:
            yield "leaks", f"{test.returned} of {test.images} images come back"
        for finding in test.layers:
            if (why := self._why_crafted(finding)) is not None:
                yield "crafted", f"{finding.layer}: {why}"

    def _searched(self, trained: Trained) -> Iterator[Finding]:
        """What attacks with a budget give back."""
        count = len(trained.received.batch)
        if self.attacks and count > self.most_images:
            yield "passed", f"{', '.join(self.attacks)} not run: {count} images, more than {self.most_images}"
            return
        for found in search(trained, self.attacks, Thresholds(correlation=self.correlation, psnr=self.psnr)):
            if found.returned is None:
                yield "passed", f"{found.attack} not run or failed: {found.why_not}"
                continue
            told = (
                f"{found.attack} gives back {len(found.returned)} of {count} images in {found.evaluations} evaluations"
            )
            yield "leaks" if len(found.returned) > self.images else "passed", told

    def _why_crafted(self, finding: LayerFinding) -> str | None:
        """What no honest layer does with these samples; None if it could be one."""
        chance = finding.chance
        if chance is None or finding.samples < FEWEST_SAMPLES or not bool(finding.returned.any()):
            return None
        share = f"gives back {finding.share:.0%} of the {_what(finding)}"
        if finding.excess > self.excess:
            return f"{share}, a freshly drawn layer {chance.share:.0%}"
        sorting = finding.crossing is not None and finding.crossing <= CHAIN_CROSSING
        if sorting and finding.share >= CHAIN_SHARE:
            return (
                f"{share} by units that sort them like bins: {finding.crossing:.0%} of their pairs cross, "
                f"of a freshly drawn layer's {chance.crossing or 0.0:.0%}"
            )
        return None

    def _shaken(self, trained: Trained) -> Iterator[Finding]:
        """What training did to the model."""
        model, batch = trained.received.model, trained.received.batch
        change = sent_change(trained.update, model.parameters)
        if trained.update.kind == "gradient":
            change = {name: -trained.received.recipe.learning_rate * tensor for name, tensor in change.items()}
        changes = relative_changes(model.parameters, change)
        changes.pop(_last(changes, model), None)  # which starts at zero where a trained body gets a new task
        weight = max(changes, key=lambda name: changes[name], default=None)
        if weight is not None and changes[weight] > self.change:
            thrown = f"training changed {weight} by {changes[weight]:.3g} times its own size"
            if thrown_alone(changes):
                yield "crafted", thrown
            else:
                yield "unusable", f"{thrown} and other weights as well: it diverged"
            before, _ = layer_views(model, batch)
            after, _ = layer_views(_moved(model, change), batch)
            dying = share_of_dying_units(before, after)
            layer = max(dying, key=lambda path: dying[path], default=None)
            if layer is not None and dying[layer] > 0.5:
                yield (
                    "passed",
                    f"{dying[layer]:.0%} of the units of {layer} were alive before training and dead after it",
                )
            surplus = surplus_loss(model, batch)
            if surplus is not None and surplus >= 0:
                yield "passed", "the received model does no better than guessing by the frequency of classes"


def _last(names: Iterable[str], model: GlobalModel) -> str:
    """The last of these weights that has a unit per class; empty if there is none."""
    return next((name for name in reversed(list(names)) if len(model.parameters[name]) == model.task.classes), "")


def _moved(model: GlobalModel, change: dict[str, Tensor]) -> GlobalModel:
    moved = {name: (tensor.double() + change[name]).to(tensor.dtype) for name, tensor in model.parameters.items()}
    return replace(model, parameters=moved)


def _what(finding: LayerFinding) -> str:
    if finding.samples == len(distinct(finding.owners)):
        return "images" if finding.sees == "image" else "images' features"
    return "patches" if finding.sees == "image" else "features"
