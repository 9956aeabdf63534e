"""The front of an attacker who knows every check, and what its maker reads of the update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from detector.crafted import recovered_share
from detector.data import drawn
from detector.forms import TRICKS, Form, OwnRows
from detector.honest import Round, new_model
from detector.own_rows import own_rows, read_own
from medpfl.attacks.balance import balanced
from medpfl.attacks.bin_readout import read_single_bins
from medpfl.attacks.brightness_bins import smoothed_edges
from medpfl.attacks.front import BIAS, SECOND_BIAS, SECOND_WEIGHT, WEIGHT, in_front
from medpfl.attacks.linear_queries import below_all, linear_query
from medpfl.attacks.updates import gradient_view
from medpfl.core.domain import GlobalModel, Observation, Recipe, Update

IMAGES = 32
RECIPE = Recipe(update="delta", batch_size=IMAGES, learning_rate=0.1)
BODIES = ("lenet_idlg", "cnn3", "strided", "all_convolutional")
GRAY = ("chest_drawn", "brain_drawn", "pneumonia", "body_parts")
FINE = 4096
"""Levels at which the distribution of a query's values is tabulated."""

NEAREST = 24
"""Auxiliary images around an edge that tell what a row's noise adds there."""

SAME = 1e-3
"""Candidates with a smaller mean squared difference are one image (30 dB)."""

LAGS = (1, 2, 4, 8, 16)
"""How far apart the units are whose differences are read where gates are not sharp."""

SUMS = 64
"""Units of the layer whose mean stands in place of equal columns."""

ENCODER, BEFORE = "front.encoder.weight", "front.before.weight"
MIXED, SUMMED = "front.mixed.weight", "front.summed.weight"

Candidates = tuple[Tensor, Tensor]
"""Images (M, D), and how large their errors are (M,)."""


@dataclass(frozen=True)
class AdaptiveRound:
    """What a client got, and what its server makes of the update."""

    round: Round
    read: Callable[[Observation], Tensor]
    detail: str

    def recovered(self, update: Update) -> float:
        """Share of the client's images above 30 dB, one candidate each, as many candidates as images."""
        own = self.round
        observation = Observation(own.model, update, own.recipe, "malicious_server")
        return recovered_share(own.batch.images, self.read(observation))


def adaptive_round(
    trick: str, strength: float, data: str, folder: Path | None, generator: torch.Generator
) -> AdaptiveRound:
    """A body, a front and a client's images, all drawn from `generator`."""
    draw, form = drawn(data, folder, IMAGES, generator), TRICKS[trick].form(strength)
    if isinstance(form, OwnRows):
        model, sent = own_rows(form, draw, RECIPE, generator)
        return AdaptiveRound(Round(sent, draw.batch(draw.client), RECIPE, model), read_own, f"strength={strength:g}")
    body = BODIES[int(torch.randint(len(BODIES), (), generator=generator))]
    model = new_model(body, draw, generator)
    owned = draw.batch(draw.auxiliary).images
    front = Front(form, tuple(model.image_shape), owned, generator)
    sent = front.in_front_of(balanced(model, front.in_front_of, owned, RECIPE))
    own = Round(sent, draw.batch(draw.client), RECIPE, model)
    return AdaptiveRound(own, front.read, f"body={body} strength={strength:g}")


class Front:
    """Draws a front and keeps what reading needs."""

    def __init__(self, form: Form, image_shape: tuple[int, ...], auxiliary: Tensor, generator: torch.Generator) -> None:
        self.form, self.image_shape, self.auxiliary, self.generator = form, image_shape, auxiliary, generator
        self.inputs = torch.Size(image_shape).numel()
        self.total = form.units + form.honest
        self.kernels = self._orthogonal(form.patch**2 * image_shape[0]) if form.patch else None
        self.before = self._orthogonal(self.inputs) if form.dense else None
        self.mixing = self._orthogonal(self.total) if form.mixed else None
        self.blocks = [self._block(len(part)) for part in self._parts()]
        rows = torch.cat([query.expand(len(edges), -1) for query, edges in self.blocks])
        thresholds = torch.cat([edges for _, edges in self.blocks])
        for size, quiet in ((form.noise, False), (form.quiet, True)):
            if size:
                rows, thresholds = self._noisy(rows, thresholds, size, quiet)
        ones, signs = torch.ones(form.units).double(), self._random(form.units).sign()
        self.sizes = self._random(form.units).exp() if form.shuffled else ones
        self.columns = signs * (0.3 + self._random(form.units).abs()) if form.shuffled else ones
        self.order = torch.randperm(self.total, generator=generator) if form.shuffled else torch.arange(self.total)
        scaled = form.scale * self.sizes
        self.tensors = self._tensors(scaled[:, None] * self._encoded(rows), -scaled * thresholds)

    def in_front_of(self, model: GlobalModel) -> GlobalModel:
        """The body behind the front; frozen layers are constants of the model, which clients neither train nor send."""
        whole = in_front(model, _Layers(self.form, self.image_shape), self.tensors)
        frozen = {name: tensor for name, tensor in whole.parameters.items() if name in (MIXED, SUMMED)}
        kept = {name: tensor for name, tensor in whole.parameters.items() if name not in frozen}
        return replace(whole, parameters=kept, constants={**whole.constants, **frozen})

    def read(self, observation: Observation) -> Tensor:
        """At most as many images as the client has, out of the gradient (float64) of the first dense layer."""
        gradient = gradient_view(observation).tensors
        weight = gradient[WEIGHT]
        if self.mixing is not None:
            undone = self.mixing @ weight
            weight, bias = undone[:, :-1], undone[:, -1]
        else:
            bias = gradient[BIAS]
        places = self.order.argsort()[: self.form.units]
        factors = self.columns / self.sizes
        weight, bias = self._decoded(weight[places] / factors[:, None]), bias[places] / factors
        found = [
            candidates
            for part, (query, edges) in zip(self._parts(), self.blocks, strict=True)
            for candidates in self._candidates(weight[part], bias[part], edges, query)
        ]
        return _agreed(found).reshape(-1, *self.image_shape)

    def _candidates(self, weight: Tensor, bias: Tensor, edges: Tensor, query: Tensor) -> list[Candidates]:
        """Of one query, with every distance between the units whose differences are read."""
        found = []
        for lag in LAGS if self.form.soft or self.form.noise or self.form.quiet else (1,):
            if lag < len(edges):
                steps, jumps = _lagged(weight, lag), _lagged(bias, lag)
                above = torch.cat([edges[lag:], edges.new_full((lag,), torch.inf)])
                seen = read_single_bins(steps, jumps, edges, above, self.image_shape, len(edges), 0.0, query)
                found.append((seen.images.flatten(1), jumps[seen.bins].abs()))
        return found

    def _parts(self) -> Sequence[Tensor]:
        return torch.arange(self.form.units).tensor_split(self.form.queries)

    def _block(self, count: int) -> tuple[Tensor, Tensor]:
        """A query (D,) and its edges (count,)."""
        query = linear_query("random" if self.form.queries > 1 else "mean", self.image_shape, self.generator)
        query = query / query.norm() / len(query) ** 0.5
        table = smoothed_edges(self.auxiliary.double().flatten(1) @ query, FINE, below_all(query))
        levels = (1 - self.form.covered) / 2 + self.form.covered * torch.arange(count).double() / count
        return query, table[(levels * FINE).long()]

    def _noisy(self, rows: Tensor, thresholds: Tensor, size: float, quiet: bool) -> tuple[Tensor, Tensor]:
        """Rows with noise, and thresholds that make up for what it adds to images near them."""
        noise, images = self._random(*rows.shape), self.auxiliary.double().flatten(1)
        if quiet:
            loud = torch.linalg.svd(images, full_matrices=False).Vh[: len(images) * 2 // 3]
            noise = noise - noise @ loud.T @ loud
        noise *= size * rows.norm(dim=1, keepdim=True) / noise.norm(dim=1, keepdim=True)
        near = (images @ rows.T - thresholds).abs().argsort(dim=0)[:NEAREST]
        return rows + noise, thresholds + (images @ noise.T).gather(0, near).mean(dim=0)

    def _tensors(self, weight: Tensor, bias: Tensor) -> dict[str, Tensor]:
        form, bound = self.form, self.inputs**-0.5
        weight = torch.cat([weight, self._uniform(form.honest, self.inputs) * bound])[self.order]
        bias = torch.cat([bias, self._uniform(form.honest) * bound])[self.order]
        tensors = {WEIGHT: weight, BIAS: bias}
        if self.mixing is not None:
            tensors = {WEIGHT: self.mixing.T @ torch.cat([weight, bias[:, None]], dim=1), MIXED: self.mixing}
        wanted, strength = self.columns / self.sizes, form.gain / (form.scale * self.total)
        if form.pooled:
            summed = self._random(SUMS, self.total)
            aims = torch.cat([wanted, self._random(form.honest) * form.scale])[self.order]
            tensors[SUMMED] = strength * (summed - summed.mean(dim=0) + aims)
        else:
            direction = self._random(self.inputs)
            columns = strength * wanted * (direction / direction.norm())[:, None]
            noise = self._random(*columns.shape)
            columns = columns + form.noise * columns.norm(dim=0) * noise / noise.norm(dim=0)
            beside = self._uniform(self.inputs, form.honest) * self.total**-0.5
            tensors[SECOND_WEIGHT] = torch.cat([columns, beside], dim=1)[:, self.order]
            mean = self.auxiliary.double().mean(dim=0).flatten()
            tensors[SECOND_BIAS] = torch.zeros_like(mean) if form.clean else mean
        if self.kernels is not None:
            tensors[ENCODER] = self._shaped(self.kernels)
        if self.before is not None:
            tensors[BEFORE] = self.before
        return {name: tensor.float().contiguous() for name, tensor in tensors.items()}

    def _encoded(self, rows: Tensor) -> Tensor:
        """Rows that do to what the layer gets what `rows` do to images."""
        if self.kernels is not None:
            images = rows.reshape(-1, *self.image_shape)
            rows = F.conv2d(images, self._shaped(self.kernels), stride=self.form.patch).flatten(1)
        return rows if self.before is None else rows @ self.before.T

    def _decoded(self, rows: Tensor) -> Tensor:
        """The images in gradients of such rows: both maps before are orthogonal."""
        rows = rows if self.before is None else rows @ self.before
        if self.kernels is None:
            return rows
        side = self.form.patch
        places = rows.reshape(len(rows), -1, self.image_shape[1] // side, self.image_shape[2] // side)
        return F.conv_transpose2d(places, self._shaped(self.kernels), stride=side).flatten(1)

    def _shaped(self, kernels: Tensor) -> Tensor:
        return kernels.reshape(-1, self.image_shape[0], self.form.patch, self.form.patch)

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def _uniform(self, *shape: int) -> Tensor:
        return 2 * torch.rand(shape, generator=self.generator, dtype=torch.float64) - 1

    def _orthogonal(self, size: int) -> Tensor:
        return torch.linalg.qr(self._random(size, size)).Q


class _Layers(nn.Module):
    """Image -> image. Its own tensors are never used."""

    def __init__(self, form: Form, image_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.form = form
        inputs, total = torch.Size(image_shape).numel(), form.units + form.honest
        self.sharpness = total / (form.soft * form.scale) if form.soft else 0.0
        if form.patch:
            channels = form.patch**2 * image_shape[0]
            self.encoder = nn.Conv2d(image_shape[0], channels, form.patch, form.patch, bias=False, device="meta")
        if form.dense:
            self.before = nn.Linear(inputs, inputs, bias=False, device="meta")
        self.first = nn.Linear(inputs + form.mixed, total, bias=not form.mixed, device="meta")
        if form.mixed:
            self.mixed = nn.Linear(total, total, bias=False, device="meta")
        if form.pooled:
            self.summed = nn.Linear(total, SUMS, bias=False, device="meta")
        else:
            self.second = nn.Linear(total, inputs, device="meta")

    def forward(self, images: Tensor) -> Tensor:
        seen = (self.encoder(images) if self.form.patch else images).flatten(1)
        if self.form.dense:
            seen = self.before(seen)
        values = self.mixed(self.first(F.pad(seen, (0, 1), value=1.0))) if self.form.mixed else self.first(seen)
        gated = F.softplus(values, beta=self.sharpness) if self.sharpness else torch.relu(values)
        if self.form.pooled:
            shift: Tensor = self.summed(gated).mean(dim=1)[:, None, None, None]
            return images + shift
        output: Tensor = self.second(gated).reshape(images.shape)
        return images + output if self.form.clean else output


def _lagged(values: Tensor, lag: int) -> Tensor:
    """Each row less the one so many places on; the last ones as they are."""
    return torch.cat([values[:-lag] - values[lag:], values[-lag:]])


def _agreed(found: Sequence[Candidates]) -> Tensor:
    """At most as many images (M, D) as the client has, none twice: first those that were found most often, then
    the largest errors. Mixtures of images are rarely found twice."""
    images, sizes = torch.cat([pair[0] for pair in found]), torch.cat([pair[1] for pair in found])
    if not len(images):
        return images
    source = torch.cat([torch.full((len(pair[0]),), place) for place, pair in enumerate(found)])
    same = torch.cdist(images, images).square() / images.shape[1] <= SAME
    votes = torch.stack([same[:, source == place].any(dim=1) for place in range(len(found))]).sum(dim=0)
    order = sizes.argsort(descending=True, stable=True)
    order = order[votes[order].argsort(descending=True, stable=True)]
    kept: list[int] = []
    for place in order.tolist():
        if len(kept) < IMAGES and not bool(same[place, kept].any()):
            kept.append(place)
    return images[kept]
