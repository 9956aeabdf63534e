"""What a model does with images: bins, traps and dead layers at work, whatever the weights look like.

No measure here depends on the order, the sign or the size of units.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from medpfl.core.tasks import SingleLabel
from medpfl.guards.layer_views import LayerView
from medpfl.guards.vetting.base import Measured, behavior, worst
from medpfl.guards.vetting.head import FISHING
from medpfl.guards.vetting.layers import FEWEST
from medpfl.guards.vetting.watch import FEWEST_IMAGES, Watched, input_variation

ALLOWED = {0.03: 0.75, 0.01: 0.5, 0.003: 0.2, 0.001: 0.05}
"""What is left of a unit's answers beside another's, as a share of what a random row would leave -> share of a layer's
units that may leave less. Nets that start small have some: their units line up while they train."""

EQUAL = 0.001
ALLOWED_ALIKE = 32
"""Units whose answers may be one unit's to `EQUAL`, however many others the layer has."""

UNITS = 4096
ROWS_AT_ONCE = 512
"""Units of a layer that are compared with each other at work, and how many with all others at once."""

FITTED = 0.9
"""Probability of its label from which an image sends next to no gradient any more, and is not counted."""

FLAT = 1e-5
"""Answers that vary less than this share of their size are rounding."""


@behavior(
    "images_come_back",
    means="leaks",
    threshold=0.0,
    summary="one simulated client step whose gradient gives the images back (read-out self-test)",
    paper="Fowl et al.: Robbing the Fed, ICLR 2022; Boenisch et al., EuroS&P 2023",
)
def images_come_back(watched: Watched) -> Measured | None:
    """The share of the images that come back from layers that see the images themselves."""
    seen = [finding for finding in watched.test.layers if finding.sees == "image"]
    if not seen:
        return None
    where = max(seen, key=lambda finding: finding.share).layer
    count, images = watched.test.returned, watched.test.images
    return Measured(count / images, where, f"{count} of {images} images came back from one simulated client step")


@behavior(
    "more_than_chance",
    means="crafted",
    threshold=0.6,
    summary="a layer that gives back more of what it gets than a freshly drawn layer of its size would",
)
def more_than_chance(watched: Watched) -> Measured | None:
    """The share of a layer's inputs that come back, less the share that chance gives; without the head."""
    found = []
    for finding in watched.test.layers:
        if watched.head is not None and finding.layer == watched.head.path:
            continue
        seen = f"{finding.share:.0%} of its inputs came back from one simulated client step"
        expected = f"{finding.chance.share:.0%} would by chance" if finding.chance else "none would by chance"
        found.append(Measured(finding.excess, finding.layer, f"{seen}, {expected}"))
    return worst(found)


@behavior(
    "bins_at_work",
    means="crafted",
    threshold=1.0,
    summary="units that answer to images alike but for their thresholds: bins, however the weights are disguised",
    paper="Fowl et al.: Robbing the Fed, ICLR 2022; Shi et al.: Scale-MIA, NDSS 2025, and MedLeak",
    limits="bins that all images of the test fall into together are not seen: test with your own images; noise of a "
    "fifth of the rows, or many times as many honest units, hide them",
)
def bins_at_work(watched: Watched) -> Measured | None:
    """How many units' answers, to the images and to grain over them, are another's up to scale and offset, while other
    images switch them on: the share of a layer's units, or the number that are one unit's alike, over what is allowed."""
    return worst([_bins(watched, view) for view in watched.wide])


def _bins(watched: Watched, view: LayerView) -> Measured:
    chosen = torch.randperm(view.units, generator=torch.Generator().manual_seed(0))[:UNITS]
    rows = watched.rows(view)[chosen]
    sets = torch.unique(_active(watched, view)[chosen], dim=0, return_inverse=True)[1]
    answers = _Answers.of(view.samples(), watched.grainy[view.path], rows)
    nearest, alike = torch.full((len(chosen),), torch.inf, dtype=torch.float64), 0
    for part in torch.split(torch.arange(len(chosen)), ROWS_AT_ONCE):
        left = torch.where(sets[part, None] != sets, answers.left_beside(part), torch.inf)
        nearest[part] = left.amin(dim=1)
        alike = max(alike, int((left < EQUAL).sum(dim=1).max()))
    shares = {limit: float((nearest < limit).double().mean()) for limit in ALLOWED}
    limit = max(ALLOWED, key=lambda limit: shares[limit] / ALLOWED[limit])
    score = max(shares[limit] / ALLOWED[limit], alike / ALLOWED_ALIKE)
    seen = (
        f"{shares[limit]:.0%} of {len(chosen)} units answer to images as another does to {limit:.1%}, up to {alike} as "
        "one does, and each is switched on by other images"
    )
    return Measured(score, view.path, seen)


@dataclass(frozen=True)
class _Answers:
    """What units answer to inputs without their mean: unit (images, units) of length 1, lengths (units,), how long the
    answers of a row of that length would be beside this one's (units,), and which units' answers vary at all."""

    unit: Tensor
    lengths: Tensor
    expected: Tensor
    varies: Tensor

    @staticmethod
    def of(received: Tensor, grainy: Tensor, rows: Tensor) -> _Answers:
        """received, grainy: two sets of inputs (N, inputs), each taken without its mean. rows: (units, inputs)."""
        sets = [inputs.double() - inputs.double().mean(dim=0) for inputs in (received, grainy)]
        inputs = torch.cat(sets).float()
        answers = (inputs @ rows.T).double()
        lengths = answers.norm(dim=0)
        unit = answers / lengths.clamp_min(1e-300)
        rest = inputs.double().square().sum() - (unit.T.float() @ inputs).square().sum(dim=1, dtype=torch.float64)
        norms = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64)
        expected = norms * (rest.clamp_min(0.0) / inputs.shape[1]).sqrt()
        return _Answers(unit, lengths, expected, lengths > FLAT * received.double().norm() * norms)

    def left_beside(self, part: Tensor) -> Tensor:
        """What is left of the answers of these units beside a multiple of each unit's, (part, units), squared lengths.

        As a share of what a random row of that length leaves on average, or of the unit's own answers where that is
        more (a unit that hardly answers leaves little beside any other): 1 is random, 0 a multiple. Infinite where
        answers do not vary.
        """
        share = (1.0 - (self.unit[:, part].T @ self.unit).square()).clamp_min(0.0)
        ratio = (self.lengths / self.expected.clamp_min(1e-300))[part, None].square()
        return torch.where(self.varies[part, None] & self.varies, share * ratio.clamp_min(1.0), torch.inf)


@behavior(
    "units_of_one_image",
    means="crafted",
    threshold=0.4,
    summary="units that a single image switches on each, as traps and sparse bins are",
    paper="Boenisch et al.: When the Curious Abandon Honesty, EuroS&P 2023",
)
def units_of_one_image(watched: Watched) -> Measured | None:
    """The share of units on for one image among those that are on for any, where these show a third of the images."""
    return worst([_singles(view) for view in watched.wide if _gated(view)])


def _singles(view: LayerView) -> Measured:
    active = view.errors != 0
    counts = active.sum(dim=1)
    single, alive = counts == 1, int((counts > 0).sum())
    shown = int(active[single].any(dim=0).sum())
    enough = alive >= FEWEST and shown >= view.images / 3
    share = int(single.sum()) / alive if enough else 0.0
    seen = f"{int(single.sum())} of {alive} units that are on at all are on for a single image, and show {shown} images"
    return Measured(share, view.path, seen)


@behavior(
    "dead_layer",
    means="crafted",
    threshold=0.0,
    summary="a dense layer that no image switches on, as clients beside a victim are sent",
    paper="Pasquini, Francati, Ateniese: Eluding Secure Aggregation, CCS 2022",
)
def dead_layer(watched: Watched) -> Measured | None:
    """The number of dense layers that no image switches on: no gradient, and all units on one side for all images.

    Layers without a gradient whose units do switch are honest: behind a head or a branch that starts at zero, say.
    """
    dense = [view for view in watched.views if view.units >= FEWEST and not view.convolution]
    if not dense or not any(bool(view.errors.any()) for view in watched.views):
        return None
    dead = [view.path for view in dense if not bool(view.errors.any()) and _one_sided(watched.answers(view))]
    return Measured(float(len(dead)), dead[0] if dead else "", f"no image switches any unit of {len(dead)} layers on")


def _one_sided(answers: Tensor) -> bool:
    return bool((answers < 0).all()) or bool((answers > 0).all())


@behavior(
    "blind_output",
    means="crafted",
    threshold=4.0,
    summary="an output that does not depend on the image, lost between one layer and the next",
    limits="untrained deep nets lose images little by little, which is not counted",
)
def blind_output(watched: Watched) -> Measured | None:
    """Where the output is blind: the largest drop (powers of ten) of how much layers' inputs differ between images."""
    variations = sorted((max(input_variation(view), 1e-9), view.path) for view in watched.views)
    if not variations:
        return None
    if variations[0][0] > FLAT:
        return Measured(0.0, "", "all layers see the image")
    drops = [(math.log10(above[0] / below[0]), below[1]) for below, above in pairwise(variations)]
    drop, where = max(drops, default=(0.0, variations[0][1]))
    return Measured(drop, where, f"behind it images differ by a factor of 10^{drop:.0f} less than before")


@behavior(
    "one_class_sends",
    means="crafted",
    threshold=100.0,
    summary="a last layer that passes the gradient of one class on and of no other",
    paper=FISHING,
    limits="needs three classes",
)
def one_class_sends(watched: Watched) -> Measured | None:
    """The largest of the classes' mean gradients at the last layer's input over their median, labels not yet fitted."""
    head = watched.head
    if head is None or head.count != head.images or head.units < 3 or not isinstance(watched.model.task, SingleLabel):
        return None
    weight = watched.rows(head).double()
    probabilities = watched.answers(head).double().softmax(dim=1)
    sizes = torch.stack([_error_sizes(weight, probabilities, label) for label in range(head.units)])
    sizes = sizes[~sizes.isnan()]
    if len(sizes) < 2 or not bool(sizes.any()):
        return Measured(0.0, head.path, "no class sends a gradient")
    ratio = float(sizes.max() / sizes.sort().values[(len(sizes) - 1) // 2].clamp_min(1e-12 * sizes.max()))
    return Measured(ratio, head.path, f"one class sends a gradient {ratio:.2g} times as large as the median class")


def _error_sizes(weight: Tensor, probabilities: Tensor, label: int) -> Tensor:
    """The mean length of the gradient that images of this label would send, of those not taken for it already."""
    errors = probabilities.clone()
    errors[:, label] -= 1.0
    unfitted = probabilities[:, label] < FITTED
    lengths: Tensor = (errors[unfitted] @ weight).norm(dim=1)
    return lengths.mean()


@behavior(
    "one_image_dominates",
    means="crafted",
    threshold=10.0,
    summary="a single image whose gradient is larger than those of all others together (D-SNR)",
    paper="D-SNR: Garov et al.: Hiding in Plain Sight: Disguising Data Stealing Attacks in FL, ICLR 2024",
    limits="of convolutions the gradient of their outputs is compared, of layers on tokens an upper bound",
)
def one_image_dominates(watched: Watched) -> Measured | None:
    """The largest over layers of: largest gradient of one image over the sum of all others'."""
    return worst([_dominance(view) for view in watched.views if view.images >= FEWEST_IMAGES])


def _dominance(view: LayerView) -> Measured:
    products = view.errors.double().square().sum(dim=0)
    if not view.convolution:
        products = products * view.squares().double()
    sizes = torch.zeros(view.images, dtype=torch.float64).index_add_(0, view.owners, products).sqrt()
    largest, total = float(sizes.max()), float(sizes.sum())
    ratio = largest / max(total - largest, 1e-9 * total) if total > 0 else 0.0
    return Measured(ratio, view.path, f"one image's gradient is {ratio:.2g} times as large as all others' together")


def _gated(view: LayerView) -> bool:
    """Whether an activation behind it switches units off altogether."""
    reached = view.errors.any(dim=0)
    return bool((view.errors[:, reached] == 0).any())


def _active(watched: Watched, view: LayerView) -> Tensor:
    """Which images switch which units on, (units, images)."""
    return view.errors != 0 if _gated(view) else watched.answers(view).T > 0
