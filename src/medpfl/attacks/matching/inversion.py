"""From observations to reconstructions by matching: checks, labels, starts, search, and what is worth saying."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from medpfl.attacks.batch_statistics import KnownStatistics, known_statistics
from medpfl.attacks.labels import LabelInference, infer_labels
from medpfl.attacks.matching.adam import noise_of
from medpfl.attacks.matching.compressed_error import compressed_error
from medpfl.attacks.matching.coupling import GroupConsistency
from medpfl.attacks.matching.curvature import gauss_newton
from medpfl.attacks.matching.engine import Found, search
from medpfl.attacks.matching.epochs import merged, spread
from medpfl.attacks.matching.gradients import Layout, matching_objective, runs_batched, why_not_computable
from medpfl.attacks.matching.initialization import GREY
from medpfl.attacks.matching.likelihoods import Likelihood, NotCombined, View, defended, likelihood
from medpfl.attacks.matching.likelihoods.clipping import inside_steps, only_scales
from medpfl.attacks.matching.notes import matching_notes
from medpfl.attacks.matching.objectives import (
    BY_LAYER,
    DISTANCES,
    SCALE_FREE,
    falling_weights,
    largest_entries,
    named_weights,
    size_weights,
    squared_distance,
    top_tensors,
    where_observed,
)
from medpfl.attacks.matching.output_error import output_error, soft_label, with_known_error
from medpfl.attacks.matching.parts import Parts
from medpfl.attacks.matching.problem import Problem, build_problem, earlier_targets, is_one_gradient
from medpfl.attacks.matching.settings import Begun, Group, Inversion, Labels, SearchSetup
from medpfl.attacks.matching.stages import added, continued
from medpfl.attacks.matching.statistics import StatisticsPrior, statistics_prior
from medpfl.attacks.updates import averaged, settled_at_once, why_no_scale
from medpfl.core.domain import Failure, Observation, Reconstruction
from medpfl.core.mechanisms import Mechanism
from medpfl.core.session import Session

GIVEN_ERROR = "candidates were given the output error that the update shows"
NO_MATRIX = (
    "the search went without the Gauss-Newton matrix, which is made for small images and models that PyTorch can "
    "differentiate often enough; many more iterations may be needed"
)

BLOCK = 10
"""Evaluations between two looks at how a search stands; where they are long, there is one after each."""


@dataclass(frozen=True)
class _Case:
    place: int
    observation: Observation
    generator: torch.Generator
    inference: LabelInference
    error: Tensor | None
    known: KnownStatistics | None


def invert(
    observations: Sequence[Observation],
    generators: Sequence[torch.Generator],
    session: Session,
    settings: Inversion,
) -> list[Reconstruction | Failure]:
    """Searches the images of every observation; one that cannot be attacked gives a `Failure`, one without any signal no images."""
    results: list[Reconstruction | Failure] = [Failure("not attacked")] * len(observations)
    cases: list[_Case] = []
    for place, (observation, generator) in enumerate(zip(observations, generators, strict=True)):
        inference = _labels(averaged(observation), settings.labels)
        known = None if settings.statistics is None else known_statistics(observation, settings.statistics)
        if (settled := settled_at_once(observation)) is not None:
            results[place] = settled
        elif inference.reason is not None:
            results[place] = Failure(inference.reason)
        elif known is not None and known.reason is not None:
            results[place] = Failure(known.reason)
        elif (
            settings.distance not in SCALE_FREE
            and (reason := why_no_scale(observation.recipe, observation.update.kind)) is not None
        ):
            results[place] = Failure(reason)
        else:
            simulated = observation.recipe is not None and not is_one_gradient(observation.recipe)
            error = None if not settings.known_error or simulated else _shown_error(observation, settings)
            cases.append(_Case(place, observation, generator, inference, error, known))
    kinds = [[one for one in cases if (one.error is not None) == known] for known in (True, False)]
    present = [kind for kind in kinds if kind]
    parts = Parts(session, len(present) * max(1, len(settings.stages)), [case.generator for case in cases])
    for kind in present:
        for case, result in zip(kind, _invert(kind, parts, settings), strict=True):
            results[case.place] = result
    return results


def _shown_error(observation: Observation, settings: Inversion) -> Tensor | None:
    """The output error that the update shows, or what a known defense leaves of it."""
    mechanism = observation.knowledge.defense if settings.distance == "likelihood" else None
    if mechanism is None or not defended(mechanism) or only_scales(mechanism):
        return output_error(observation)
    return compressed_error(observation, mechanism)


def _labels(observation: Observation, kind: Labels) -> LabelInference:
    if kind == "soft":
        return LabelInference(None, 1.0)
    if kind == "given":
        word = "masks" if observation.model.task.name == "segmentation" else "labels"
        given: Tensor | None = getattr(observation.knowledge, word)
        return LabelInference(given, 1.0, reason=None if given is not None else f"{word} were not granted")
    return infer_labels(observation)


def _invert(cases: Sequence[_Case], parts: Parts, settings: Inversion) -> list[Reconstruction | Failure]:
    """Cases that all show their output error, or all do not."""
    if cases[0].error is not None and settings.distance_with_error is not None:
        settings = replace(settings, distance=settings.distance_with_error)
    first = cases[0].observation
    known = first.knowledge.defense if settings.distance == "likelihood" else None
    if cases[0].error is not None and only_scales(known):
        known = None
    likelihoods = settings.distance == "likelihood"
    seen = [case.observation if likelihoods else averaged(case.observation) for case in cases]
    hooks = inside_steps(known, first.recipe, first.examples)
    problem = build_problem(seen, settings.precision, settings.separate_epochs, defended(known), hooks)
    earlier = earlier_targets(seen, settings.precision, settings.separate_epochs, defended(known), hooks)
    if settings.largest_entries is not None:
        problem = replace(problem, targets=largest_entries(problem.targets, settings.largest_entries))
    model = problem.models[0]
    try:
        likely = _likelihood(first, known, problem, earlier, settings)
    except NotCombined as refused:
        return [Failure(str(refused))] * len(cases)
    distance, plain = likely.matching(), likely.weights is None
    weights = likely.tensor_weights(problem.names).to(problem.targets[0]) * _weights(problem, settings)
    if not bool(weights.any()):
        return [Failure(f"no trainable tensor has a name like {', '.join(settings.tensors or ())}")] * len(cases)
    norms = problem.squared_norms(weights)
    units = norms.clamp_min(torch.finfo(norms.dtype).tiny) if settings.scaled else torch.ones_like(norms)
    weights = settings.gradient_weight * weights / units[:, None]
    if settings.assumed_noise is not None and not likely.nats:
        entries = sum(target[0].numel() for target in problem.targets)
        weights = (
            0.5
            * entries
            / (likely.deviation or settings.assumed_noise) ** 2
            * weights
            / norms[:, None].clamp_min(torch.finfo(norms.dtype).tiny)
        )
    shown = [case.error for case in cases if case.error is not None]
    errors = torch.stack(shown).to(problem.device, problem.dtype) if shown else None
    curvature, contrast = None, 1.0
    labels: Tensor | None
    if errors is not None:
        soft, searched, labels = False, with_known_error(problem), errors[:, None]
        if settings.damping is not None:
            curvature = gauss_newton(searched, errors, weights, settings.damping)
        contrast = 1.0 if curvature is None else settings.contrast
    else:
        soft, searched = settings.labels == "soft", problem
        several = None if soft else [_arranged(case, problem, settings.labels) for case in cases]
        labels = None if several is None else torch.stack(several).to(problem.device)
    if likely.evidence is not None:
        searched = replace(searched, targets=likely.evidence)
    shape = (problem.copies * problem.examples, *model.image_shape)
    layout = Layout(shape, model.task.output_shape(model.image_shape) if soft else ())
    precondition, matrix_evaluations = curvature or (None, (0,) * len(cases))
    block = 1 if problem.device.type == "cpu" and not runs_batched(model) else BLOCK
    setup = SearchSetup(
        layout, block, precondition, noise_of([case.generator for case in cases]), tuple(case.place for case in cases)
    )
    at_once = settings.restarts if settings.retry_above is None else 1
    objective = matching_objective(
        searched,
        layout,
        labels,
        distance=distance if settings.largest_entries is None else where_observed(distance),
        weights=weights,
        prior=settings.prior,
        statistics=_statistics(cases, settings, problem.targets[0]),
        evaluations=len(cases) * at_once * settings.solver(setup).evaluations,
    )
    if (reason := why_not_computable(objective, layout, problem.targets[0])) is not None:
        return [Failure(f"gradients of this model cannot be matched in {settings.precision}: {reason}")] * len(cases)

    def searched_from(points: Tensor | None, begun: Begun, session: Session) -> list[Found]:
        return search(
            added(objective, begun.term),
            begun.solver,
            (lambda: _starts(cases, layout, settings, contrast, problem.dtype).to(problem.device))
            if points is None
            else (lambda: points[:, None]),
            (settings.goal + settings.relative_goal * norms) / units,
            restarts=settings.restarts if points is None else 1,
            retry_above=None if settings.retry_above is None else settings.retry_above * norms / units,
            coupling=_coupling(settings.group, layout, labels if errors is None else None),
            generators=[case.generator for case in cases],
            session=session,
        )

    found = _staged(settings, setup, parts, searched_from, problem.targets[0])
    results: list[Reconstruction | Failure] = []
    for index, (case, one) in enumerate(zip(cases, found, strict=True)):
        unweighted = distance is squared_distance and plain and settings.distance_only
        scale = float(norms[index]) if unweighted else None
        error = None if errors is None or settings.labels != "soft" else errors[index].cpu()
        one = replace(one.in_units(float(units[index])), evaluations=one.evaluations + matrix_evaluations[index])
        fixed = case.inference.labels if labels is None or errors is not None else labels[index].cpu()
        results.append(
            _reconstruction(
                case,
                one,
                layout,
                problem,
                scale,
                error,
                fixed,
                settings.damping is None or curvature is not None,
                likely.notes,
            )
        )
    return results


def _staged(
    settings: Inversion,
    setup: SearchSetup,
    parts: Parts,
    searched_from: Callable[[Tensor | None, Begun, Session], list[Found]],
    like: Tensor,
) -> list[Found]:
    """What the last stage found, or the only search. A victim without a finite iterate keeps what is not."""
    found: list[Found] | None = None
    points: Tensor | None = None
    for stage in settings.stages or (lambda _points, setup: Begun(None, settings.solver(setup)),):
        begun = stage(points, setup)
        now = parts.run(partial(searched_from, points, begun))
        found = continued(found, now)
        points = torch.stack([one.variables for one in found]).to(like)
    assert found is not None  # there is at least one stage
    return found


def _statistics(cases: Sequence[_Case], settings: Inversion, like: Tensor) -> StatisticsPrior | None:
    known = [case.known for case in cases if case.known is not None]
    return statistics_prior(known, settings.statistics_weight, settings.first_layer, like) if known else None


def _coupling(group: Group | None, layout: Layout, labels: Tensor | None) -> GroupConsistency | None:
    """None where nothing is coupled."""
    return None if group is None else GroupConsistency(layout, group.weight, group.every, group.register, labels)


def _weights(problem: Problem, settings: Inversion) -> Tensor:
    weights = problem.targets[0].new_ones(len(problem.models), len(problem.names))
    if settings.distance in BY_LAYER:
        weights = size_weights(problem.targets, settings.size_power)
    if settings.largest_tensors is not None:
        weights = weights * top_tensors(problem.targets, settings.largest_tensors)
    if settings.tensors is not None:
        weights = weights * named_weights(problem.names, settings.tensors).to(weights)
    return weights * falling_weights(problem.names, settings.layer_decay).to(weights)


def _likelihood(
    observation: Observation,
    known: Mechanism | None,
    problem: Problem,
    earlier: tuple[tuple[Tensor, ...], ...],
    settings: Inversion,
) -> Likelihood:
    """That of a known defense, or the distance by its name. Raises NotCombined."""
    if settings.distance != "likelihood":
        return Likelihood(DISTANCES[settings.distance])
    view = View(problem.names, problem.targets, observation.model, observation.recipe, observation.examples, earlier)
    return likelihood(known, view)


def _arranged(case: _Case, problem: Problem, kind: Labels) -> Tensor:
    """Labels of all variables (copies * K,): given ones as they are, inferred ones spread over a client's steps."""
    labels = case.inference.labels
    assert labels is not None
    if kind == "inferred" and problem.simulate is not None and labels.ndim == 1:
        labels = spread(labels)
    return labels.repeat(problem.copies, *(1 for _ in labels.shape[1:]))


def _starts(cases: Sequence[_Case], layout: Layout, settings: Inversion, contrast: float, dtype: torch.dtype) -> Tensor:
    """(V, restarts, n): every victim's starts from its own generator, in the order of the restarts."""
    everything = []
    for case in cases:
        for _ in range(settings.restarts):
            images = settings.start(layout.images, case.generator).reshape(-1)
            if contrast < 1.0:
                images = GREY + contrast * (images - GREY)
            logits = torch.randn(layout.size - layout.pixels, generator=case.generator, dtype=torch.float64)
            everything.append(torch.cat([images, logits]))
    return torch.stack(everything).reshape(len(cases), settings.restarts, layout.size).to(dtype)


def _reconstruction(
    case: _Case,
    found: Found,
    layout: Layout,
    problem: Problem,
    target_square: float | None,
    error: Tensor | None,
    fixed: Tensor | None,
    preconditioned: bool,
    supposed: tuple[str, ...] = (),
) -> Reconstruction | Failure:
    """error: the output error that the labels follow from, where they were neither given nor searched. fixed: the
    labels of all variables where they were given or inferred. supposed: what was supposed of a known defense.
    """
    if not found.objective < float("inf"):
        return Failure(f"none of {found.restarts} starts had a finite objective")
    images, logits = layout.split(found.variables)
    task, labels = problem.models[0].task, fixed
    probabilities = None if logits is None else layout.targets(task, logits)
    if error is not None:
        with torch.no_grad():
            model = case.observation.model.to(problem.dtype)
            output, _ = model.forward(images.to(model.device), batch_norm=problem.batch_norm)
        probabilities = soft_label(task, output.cpu(), error)
    masks = None
    if task.name == "segmentation":
        labels, masks = None, None if probabilities is None else probabilities.argmax(dim=1)
    elif probabilities is not None:
        labels = (probabilities > 0.5).float() if task.name == "multi_label" else probabilities.argmax(dim=-1)
    images = merged(images, labels, problem.copies)
    labels = None if labels is None else labels[: problem.examples]
    known = () if case.error is None else (GIVEN_ERROR,) if preconditioned else (GIVEN_ERROR, NO_MATRIX)
    known = known if case.known is None else (*known, case.known.note)
    return Reconstruction(
        images=images.clamp(0.0, 1.0),
        labels=labels,
        masks=masks,
        objective=found.objective,
        trace=found.trace,
        gradient_evaluations=found.evaluations * problem.steps,
        stop_reason=found.stop_reason,
        unclamped=images,
        notes=(
            *case.inference.notes,
            *known,
            *supposed,
            *matching_notes(case.observation, problem, found, target_square),
        ),
    )
