"""Defenses of features and images: what they leave in the update is matched, what they touch is left out."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from medpfl.attacks.matching.likelihoods.base import Likelihood, View, likelihood_of
from medpfl.attacks.matching.objectives import cosine_distance
from medpfl.core.mechanisms import Augmented, MaskedFeatures, Mixtures, StochasticLayer
from medpfl.models.bottleneck import bottleneck_of, classifier


@likelihood_of(MaskedFeatures)
def masked_features(_mechanism: MaskedFeatures, view: View) -> Likelihood:
    """The candidate's classifier is masked where the observed one is, so that only what was sent is compared."""
    path = classifier(view.model)
    name = f"{path}.weight"
    if name not in view.names:
        return Likelihood()
    place = view.names.index(name)

    def transform(gradients: Sequence[Tensor], targets: Sequence[Tensor]) -> list[Tensor]:
        found = list(gradients)
        kept = (targets[place] != 0).any(dim=0, keepdim=True)
        found[place] = torch.where(kept, found[place], 0.0)
        return found

    return Likelihood(transform=transform, notes=("the classifier's columns that the client masked were left out",))


@likelihood_of(StochasticLayer)
def stochastic_layer(_mechanism: StochasticLayer, view: View) -> Likelihood:
    """Tensors from the noisy layer on say nothing without the client's draw; the layers before it are compared in
    direction, because the noise changes the length of what is handed back to them (Balunovic et al. 2022)."""
    path = bottleneck_of(view.model)
    weights = torch.tensor([0.0 if name.startswith(f"{path}.") else 1.0 for name in view.names], dtype=torch.float64)
    if not bool(weights.any()):
        return Likelihood(notes=("every layer lies behind the noise",))
    return Likelihood(
        distance=cosine_distance, weights=weights, notes=("only layers in front of the noisy one were matched",)
    )


@likelihood_of(Mixtures)
def mixtures(_mechanism: Mixtures, _view: View) -> Likelihood:
    """The gradient is that of the mixtures, as it is."""
    return Likelihood(notes=("what comes back are mixtures of images; mixture_decoding takes them apart",))


@likelihood_of(Augmented)
def augmented(_mechanism: Augmented, _view: View) -> Likelihood:
    """The gradient is that of the changed images, as it is."""
    return Likelihood(notes=("what comes back are images after the client's operations; ats_decoding undoes them",))
