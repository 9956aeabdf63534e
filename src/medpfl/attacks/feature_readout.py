"""Feature read-out: the last layer gives its input features away in closed form; images are searched that have them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from medpfl.attacks.base import ATTACKS, Attack
from medpfl.attacks.labels import infer_labels
from medpfl.attacks.layers import DenseLayer, last_dense, why_no_single_input
from medpfl.attacks.matching.engine import Found, search
from medpfl.attacks.matching.features import feature_objective
from medpfl.attacks.matching.gradients import BatchedObjective, Layout, why_not_computable
from medpfl.attacks.matching.initialization import uniform
from medpfl.attacks.matching.lbfgs import LBFGS
from medpfl.attacks.updates import gradient_view, nothing_came_back, settled_at_once, why_no_ratios
from medpfl.core.config import STRICT
from medpfl.core.devices import CPU, moved
from medpfl.core.domain import Failure, GlobalModel, Observation, Recipe, Reconstruction, UpdateKind
from medpfl.core.session import NO_SESSION, Session

NOT_MET = 1e-4
"""A start that leaves more than this share of the features' squared norm unexplained (prior included) has failed."""

MANY_FEATURES = 2
"""With at least this many features per pixel the features are taken to determine the image."""

FEW_FEATURES_TOTAL_VARIATION = 1e-5
"""Default weight of total variation with fewer features: of 0 to 1e-3 it reconstructed brain MRI, chest X-rays and
melanomas at 32x32 best over all on DLG's LeNet (768 features)."""


@ATTACKS.register(
    "feature_readout",
    summary="features from dW/db of the last layer, then L-BFGS on the image until the model gives these features",
    paper="follows from Phong et al. 2018, section III, applied to the last layer",
    limits="exact only where the features determine the image (many more features than pixels); SGD or plain gradients;"
    " in a batch one image per class, the class mean feature's",
)
@dataclass(frozen=True, kw_only=True, config=STRICT)
class FeatureReadout(Attack):
    """1. For one image row c of the last layer has dW_c = db_c f, so its input f = sum(db_c dW_c) / sum(db_c^2).
    2. L-BFGS on |features(image) - f|^2 / |f|^2 + total_variation * TV(image).

    Total variation chooses among the many images that share few features. Where there are `MANY_FEATURES` times as
    many features as pixels it only blurs, so it is left out by default.

    For several images dW_c / db_c is read for each class that label inference finds. It is a mean feature in which
    that class's images dominate, so one image per class comes back and blends images that share a class.
    """

    iterations: Annotated[int, Field(ge=1, description="L-BFGS steps at most")] = 1_000
    restarts: Annotated[int, Field(ge=1, description="starts at most; a further one only if all before got stuck")] = 1
    history: Annotated[int, Field(ge=1, description="gradient differences that L-BFGS remembers")] = 50
    total_variation: Annotated[
        float | None,
        Field(ge=0, description="weight of total variation; by default 1e-5 if features are few (below), else 0"),
    ] = None
    tolerance: Annotated[
        float, Field(ge=0, description="share of the features' squared norm at which the search ends")
    ] = 1e-12

    presets: ClassVar[dict[str, dict[str, Any]]] = {
        "published": {"total_variation": 0.0},
        "quick": {"iterations": 200},
    }

    def why_not(self, model: GlobalModel, recipe: Recipe | None, update: UpdateKind, examples: int) -> str | None:
        """The last layer must be dense with a bias, called once, and trained by plain SGD."""
        layer = last_dense(model)
        if isinstance(layer, str):
            return layer
        if layer.bias is None:
            return f"the last layer '{layer.module}' has no bias, so nothing can be divided by its gradient"
        return why_no_ratios(recipe) or why_no_single_input(model, layer)

    def evaluations(self, model: GlobalModel, images: int) -> int:
        """All restarts with the longest line searches, at most one search per private image."""
        return images * self.restarts * self._solver().evaluations

    def reconstruct(
        self,
        observations: Sequence[Observation],
        generators: Sequence[torch.Generator],
        session: Session = NO_SESSION,
    ) -> list[Reconstruction | Failure]:
        """Reads all features, then searches all images at once."""
        results: list[Reconstruction | Failure] = []
        places: list[int] = []
        features: list[Tensor] = []
        for place, observation in enumerate(moved(list(observations), CPU)):
            read = self._features(observation)
            results.append(Failure("not searched") if isinstance(read, Tensor) else read)
            if isinstance(read, Tensor):
                places += [place] * len(read)
                features += list(read)
        if not features:
            return results
        shown = [observations[place] for place in places]
        layout = Layout((1, *shown[0].model.image_shape))
        wanted = torch.stack(features).to(shown[0].model.device)
        objective = feature_objective(shown, wanted, self._smoothing(layout, features[0]))
        if (reason := why_not_computable(objective, layout, wanted)) is not None:
            failure = Failure(f"features of this model cannot be inverted in float64: {reason}")
            return [failure if place in places else result for place, result in enumerate(results)]
        found = self._search(objective, layout, places, wanted, generators, session)
        for place in sorted(set(places)):
            mine = [one for one, owner in zip(found, places, strict=True) if owner == place]
            results[place] = _reconstruction(observations[place], mine)
        return results

    def _features(self, observation: Observation) -> Tensor | Reconstruction | Failure:
        """Features (K, inputs) of the images that the last layer shows, or what comes of an update without any."""
        if (settled := settled_at_once(observation)) is not None:
            return settled
        known = (observation.model, observation.recipe, observation.update.kind, observation.examples)
        if (reason := self.why_not(*known)) is not None:
            return Failure(reason)
        layer = last_dense(observation.model)
        assert isinstance(layer, DenseLayer)
        assert layer.bias is not None
        view = gradient_view(observation)
        if (lost := view.why_lost(layer.weight, layer.bias)) is not None:
            return nothing_came_back(observation, lost)
        weight, bias = view.tensors[layer.weight], view.tensors[layer.bias]
        if not bool(bias.abs().max() > 0):
            return nothing_came_back(
                observation, "the last layer's bias gradient is zero, the model makes no error on the private images"
            )
        if observation.examples == 1:
            return (bias @ weight / bias.square().sum())[None]
        labels = infer_labels(observation).labels
        present = torch.unique(labels) if labels is not None else torch.nonzero(bias < 0).flatten()
        present = present[bias[present] != 0]
        if not len(present):
            return nothing_came_back(observation, "no class of the batch shows itself in the last layer")
        return weight[present] / bias[present, None]

    def _search(
        self,
        objective: BatchedObjective,
        layout: Layout,
        places: Sequence[int],
        wanted: Tensor,
        generators: Sequence[torch.Generator],
        session: Session,
    ) -> list[Found]:
        def starts() -> Tensor:
            drawn = [
                torch.stack([uniform(layout.images, generators[place]).reshape(-1) for _ in range(self.restarts)])
                for place in places
            ]
            return torch.stack(drawn).to(wanted.device)

        return search(
            objective,
            self._solver(),
            starts,
            wanted.new_full((len(places),), self.tolerance),
            restarts=self.restarts,
            retry_above=wanted.new_full((len(places),), NOT_MET),
            generators=[generators[place] for place in places],
            session=session,
        )

    def _smoothing(self, layout: Layout, features: Tensor) -> float:
        if self.total_variation is not None:
            return self.total_variation
        return 0.0 if len(features) >= MANY_FEATURES * layout.pixels else FEW_FEATURES_TOTAL_VARIATION

    def _solver(self) -> LBFGS:
        return LBFGS(iterations=self.iterations, history=self.history)


def _reconstruction(observation: Observation, found: Sequence[Found]) -> Reconstruction | Failure:
    """The images of one observation, best met features first."""
    finite = sorted((one for one in found if one.objective < float("inf")), key=lambda one: one.objective)
    if not finite:
        return Failure("no start had a finite objective")
    images = torch.stack([one.variables.reshape(observation.model.image_shape) for one in finite])
    worst = finite[-1]
    inference = infer_labels(observation) if len(finite) == observation.examples == 1 else None
    notes = gradient_view(observation).notes
    if worst.objective > NOT_MET:
        notes = (*notes, f"the features were not met: {worst.objective:.1e} of their squared norm remains")
    if observation.recipe is not None and observation.recipe.batch_norm == "train":
        notes = (*notes, "features were inverted with running statistics of batch norm, the client used its batch's")
    if observation.examples > 1:
        notes = (*notes, "one image per class of a batch, from the class mean feature")
    return Reconstruction(
        images=images.clamp(0.0, 1.0),
        labels=inference.labels if inference is not None else None,
        objective=sum(one.objective for one in finite),
        trace=finite[0].trace,
        gradient_evaluations=sum(one.evaluations for one in found),
        stop_reason=worst.stop_reason,
        unclamped=images,
        notes=notes,
    )
