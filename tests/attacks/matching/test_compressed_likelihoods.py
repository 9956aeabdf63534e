"""Likelihoods of compressed updates: zero for the truth, and what they say of others, against NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medpfl.attacks.idlg import IDLG
from medpfl.attacks.matching.compressed_error import compressed_error
from medpfl.attacks.matching.likelihoods import Likelihood, View, likelihood
from medpfl.attacks.matching.likelihoods.intervals import steps
from medpfl.core.domain import Batch, ClientState, GlobalModel, Observation, Reconstruction, Update
from medpfl.core.functional import psnr
from medpfl.core.knowledge import Knowledge
from medpfl.core.mechanisms import CutOff, OrthogonalDirection, Quantized
from medpfl.core.recipes import Recipe
from medpfl.core.tasks import SingleLabel
from medpfl.data import PhantomReader
from medpfl.defenses import LowRankFactors, Prune, Quantize, RandomEntries, Sign, TopEntries
from medpfl.defenses.censor import orthogonal
from medpfl.defenses.compression import Compression
from medpfl.federation.client import client_step
from medpfl.models import build_model

SHAPES = {"conv.weight": (12, 5, 5, 5), "conv.bias": (12,), "fc.weight": (10, 300)}

DEFENSES: dict[str, Compression] = {
    "prune": Prune(percentile=80),
    "top_k": TopEntries(share=0.2),
    "top_k-global": TopEntries(share=0.2, scope="global"),
    "random_k": RandomEntries(share=0.2),
    "quantize": Quantize(bits=4),
    "quantize-blocks": Quantize(bits=4, block=50),
    "stochastic": Quantize(bits=4, rounding="stochastic"),
    "qsgd": Quantize(bits=6, scale="norm", rounding="stochastic"),
    "low_rank": LowRankFactors(rank=2),
}


@pytest.fixture(scope="module")
def model() -> GlobalModel:
    """Any model: these likelihoods do not look at it."""
    generator = torch.Generator().manual_seed(0)
    return build_model("lenet_idlg", image_shape=(1, 8, 8), task=SingleLabel(2), generator=generator)


def gradient(seed: int = 0) -> list[Tensor]:
    """Tensors with heavy tails in float64."""
    source = np.random.default_rng(seed)
    return [torch.from_numpy(source.standard_t(3, shape)) for shape in SHAPES.values()]


def observed(defense: Compression, rounds: int, model: GlobalModel) -> View:
    """What an adversary sees of a client that answers with the same gradient in every round."""
    trainable = dict(zip(SHAPES, gradient(), strict=True))
    state, generator, messages = ClientState(), torch.Generator().manual_seed(0), []
    for _ in range(rounds):
        update, state = defense.update(Update("gradient", trainable, {}, {}, 1), model, state, generator)
        messages.append(tuple(tensor[None] for tensor in update.trainable.values()))
    return View(tuple(SHAPES), messages[-1], model, None, earlier=tuple(messages[:-1]))


def value(known: Likelihood, view: View, candidate: list[Tensor]) -> float:
    """The objective of a candidate's gradients."""
    targets = view.targets if known.evidence is None else known.evidence
    return float(known.matching()(candidate, [one[0] for one in targets], known.tensor_weights(view.names)))


@pytest.mark.parametrize("rounds", [1, 3])
@pytest.mark.parametrize("feedback", [False, True])
@pytest.mark.parametrize("name", DEFENSES)
def test_nothing_is_likelier_than_the_truth(name: str, feedback: bool, rounds: int, model: GlobalModel) -> None:
    defense = type(DEFENSES[name])(**{**vars(DEFENSES[name]), "error_feedback": feedback})
    view = observed(defense, rounds, model)
    known = likelihood(defense.mechanism(), view)
    assert value(known, view, gradient()) < 1e-18
    assert value(known, view, gradient(1)) > 1.0


@pytest.mark.parametrize("name", ["random_k", "stochastic", "qsgd"])
def test_rounds_with_fresh_randomness_say_more(name: str, model: GlobalModel) -> None:
    def width(rounds: int) -> float:
        known = likelihood(DEFENSES[name].mechanism(), observed(DEFENSES[name], rounds, model))
        assert known.evidence is not None
        lowest, highest = known.evidence[2][0]
        return float((highest - lowest).clamp_max(100.0).mean())

    assert width(8) < 0.7 * width(1)


@pytest.mark.parametrize("name", ["top_k", "prune", "quantize"])
def test_with_feedback_what_was_left_out_comes_later(name: str, model: GlobalModel) -> None:
    defense = type(DEFENSES[name])(**{**vars(DEFENSES[name]), "error_feedback": True})

    def width(rounds: int) -> float:
        known = likelihood(defense.mechanism(), observed(defense, rounds, model))
        assert known.evidence is not None
        lowest, highest = known.evidence[2][0]
        return float((highest - lowest).mean())

    assert width(8) < 0.3 * width(1)


def test_top_entries_are_known_and_others_are_no_larger_than_the_smallest(model: GlobalModel) -> None:
    defense = TopEntries(share=0.2)
    view = observed(defense, 1, model)
    evidence = likelihood(defense.mechanism(), view).evidence
    assert evidence is not None
    for tensor, bounds in zip(gradient(), evidence, strict=True):
        flat, (lowest, highest) = tensor.numpy().reshape(-1), bounds[0].flatten(1).numpy()
        kept = np.argsort(-np.abs(flat))[: int(np.ceil(0.2 * flat.size))]
        limit = np.abs(flat[kept]).min()
        np.testing.assert_array_equal(lowest[kept], flat[kept])
        np.testing.assert_array_equal(highest[kept], flat[kept])
        rest = np.setdiff1d(np.arange(flat.size), kept)
        np.testing.assert_array_equal(highest[rest], np.full(rest.size, limit))
        np.testing.assert_array_equal(lowest[rest], np.full(rest.size, -limit))


def test_where_less_was_sent_than_allowed_the_rest_is_zero(model: GlobalModel) -> None:
    message = (torch.tensor([[0.0, 3.0, 0.0, 0.0]], dtype=torch.float64),)
    evidence = likelihood(TopEntries(share=0.5).mechanism(), View(("weight",), message, model, None)).evidence
    assert evidence is not None
    assert evidence[0][0].tolist() == [[0.0, 3.0, 0.0, 0.0], [0.0, 3.0, 0.0, 0.0]]


@pytest.mark.parametrize("scale", ["max", "norm"])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_the_step_shows_in_the_message(scale: Any, rounding: Any, model: GlobalModel) -> None:
    defense = Quantize(bits=5, scale=scale, rounding=rounding, block=40)
    tensor = gradient()[2]
    update = Update("gradient", {"fc.weight": tensor}, {}, {}, 1)
    sent, _ = defense.update(update, model, ClientState(), torch.Generator().manual_seed(2))
    found = steps(sent.trainable["fc.weight"][None], Quantized(15, scale, rounding == "stochastic", 40))
    blocks = tensor.numpy().reshape(-1, 40)
    size = np.abs(blocks).max(axis=1) if scale == "max" else np.linalg.norm(blocks, axis=1)
    np.testing.assert_allclose(found.numpy().reshape(-1, 40)[:, 0], size / 15, rtol=1e-9)


def test_signs_say_more_of_larger_entries(model: GlobalModel) -> None:
    defense = Sign()
    view = observed(defense, 1, model)
    known = likelihood(defense.mechanism(), view)
    truth = gradient()
    largest, smallest = ([one.clone() for one in truth] for _ in range(2))
    order = truth[2].abs().flatten().argsort()
    largest[2].view(-1)[order[-1]] *= -1
    smallest[2].view(-1)[order[0]] *= -1
    best = value(known, view, truth)
    assert best < value(known, view, smallest) < value(known, view, largest)
    assert best < value(known, view, [2.0 * one for one in truth])  # its length shows in the scale


def test_orthogonal_directions_show_norms_and_one_equation_per_tensor(model: GlobalModel) -> None:
    truth, generator = gradient(), torch.Generator().manual_seed(4)
    sent = [tuple(orthogonal(one, generator)[None] for one in truth) for _ in range(2)]
    view = View(tuple(SHAPES), sent[1], model, None, earlier=(sent[0],))
    known = likelihood(OrthogonalDirection(), view)
    assert value(known, view, truth) < 1e-20
    assert value(known, view, [2.0 * one for one in truth]) == pytest.approx(0.5 * 3.0)
    assert (
        value(known, view, [one[0] for one in sent[0]]) > 0.5 * 2.9
    )  # the cosine with the first round's direction is 1


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("name", [*DEFENSES, "sign"])
@pytest.mark.parametrize("feedback", [False, True])
def test_what_compression_leaves_of_the_output_error(name: str, feedback: bool, classes: int) -> None:
    generator = torch.Generator().manual_seed(3)
    net = build_model("lenet_dlg", image_shape=(1, 16, 16), task=SingleLabel(classes), generator=generator)
    batch = Batch(torch.rand((1, 1, 16, 16), generator=generator), torch.tensor([1]))
    clean, _ = client_step(net, batch, Recipe())
    chosen = {**DEFENSES, "sign": Sign()}[name]
    defense = type(chosen)(**{**vars(chosen), "error_feedback": feedback})
    state, sent = ClientState(), []
    for _ in range(3):
        update, state = client_step(net, batch, Recipe(), hooks=defense, state=state, generator=generator)
        sent.append(update)
    seen = Observation(net, sent[-1], Recipe(), "honest_server", earlier=tuple(sent[:-1]))
    found = compressed_error(seen, defense.mechanism())
    truth = clean.trainable["fc.bias"].double()
    if name == "random_k" and found is None:  # no entry of the bias was drawn
        return
    assert found is not None
    assert abs(float(found.sum())) < 1e-6
    exact = classes == 2 and not name.startswith(("stochastic", "qsgd", "quantize-blocks"))
    tolerance = 1e-5 if exact else 1.0 if name.startswith(("random_k", "sign", "top_k", "prune")) else 0.5
    assert float((found - truth).norm()) <= tolerance * float(truth.norm())


@pytest.mark.parametrize(
    ("defense", "variation", "better"),
    [(Quantize(bits=4), 1e-3, 0.5), (TopEntries(share=0.1), 1e-2, 2.0), (Sign(), 1e-2, 2.0)],
)
def test_who_knows_the_compression_reconstructs_more(defense: Compression, variation: float, better: float) -> None:
    sample = next(iter(PhantomReader(kind="brain", count=1, resolution=32).read()))
    picture = nn.functional.interpolate(sample.image[None], (16, 16), mode="area")
    net = build_model(
        "lenet_dlg", image_shape=(1, 16, 16), task=SingleLabel(2), generator=torch.Generator().manual_seed(0)
    )
    sent, _ = client_step(net, Batch(picture, torch.tensor([1])), Recipe(), hooks=defense)

    def decibels(attack: IDLG, knowledge: Knowledge) -> float:
        seen = Observation(net, sent, Recipe(), "honest_server", knowledge)
        (result,) = attack.reconstruct([seen], [torch.Generator().manual_seed(1)])
        assert isinstance(result, Reconstruction)
        return float(psnr(result.images, picture))

    knowing = IDLG(iterations=6, restarts=1, distance="likelihood", total_variation=variation)
    naive = IDLG(iterations=20, restarts=1)  # the 256 columns of the other's preconditioner are evaluations too
    assert decibels(knowing, Knowledge(defense=defense.mechanism())) > decibels(naive, Knowledge()) + better


@pytest.mark.parametrize("sparse", [False, True])
def test_what_was_cut_off_is_at_least_as_large_and_zeros_are_at_most_as_large_as_what_is_left(
    sparse: bool, model: GlobalModel
) -> None:
    own = [one.numpy() for one in gradient()]
    limit, least = 1.5, np.quantile(np.abs(np.concatenate([one.ravel() for one in own])), 0.3) if sparse else 0.0
    sent = [np.where(np.abs(one) < least, 0.0, np.clip(one, -limit, limit)) for one in own]
    smallest = min(np.abs(one[one != 0]).min() for one in sent)
    view = View(tuple(SHAPES), tuple(torch.from_numpy(one)[None] for one in sent), model, None)
    known = likelihood(CutOff(limit, sparse), view)
    assert value(known, view, gradient()) == 0.0
    other = [one.numpy() for one in gradient(1)]
    expected = 0.0
    for candidate, message in zip(other, sent, strict=True):
        below, above = message.copy(), message.copy()
        below[message <= -limit], above[message >= limit] = -np.inf, np.inf
        if sparse:
            below[message == 0], above[message == 0] = -smallest, smallest
        apart = np.maximum(below - candidate, 0) ** 2 + np.maximum(candidate - above, 0) ** 2
        expected += apart.sum()
    assert value(known, view, gradient(1)) == pytest.approx(expected)
