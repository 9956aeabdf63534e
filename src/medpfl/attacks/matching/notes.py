"""What an attacker can say about why matching worked or failed, without the truth."""

from __future__ import annotations

from torch import nn

from medpfl.attacks.matching.engine import Found
from medpfl.attacks.matching.problem import Problem
from medpfl.core.domain import Observation

MATCHED = 1e-6
"""Share of the target's squared norm below which the gradient counts as matched."""

KINKED = (nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.Hardtanh, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)


def matching_notes(
    observation: Observation, problem: Problem, found: Found, target_square: float | None
) -> tuple[str, ...]:
    """Plain sentences: how well the update was matched, and which properties of the model make matching hard."""
    notes = []
    if target_square is not None and target_square > 0:
        share = found.objective / target_square
        if share > MATCHED:
            notes.append(f"the update was not matched: {share:.1e} of its squared norm remains unexplained")
    module = problem.models[0].module
    kinked = sorted({type(layer).__name__ for layer in module.modules() if isinstance(layer, KINKED)})
    if kinked:
        notes.append(f"the model is not smooth ({', '.join(kinked)}), which hampers second-order matching")
    if problem.batch_norm == "train" and any(getattr(one, "functional_batch_norm", False) for one in module.modules()):
        notes.append("batch norm in train mode mixes the images of a batch")
    if problem.simulate is not None:
        notes.append(f"every candidate was trained as the client trains ({problem.steps} steps per evaluation)")
        notes += _order_notes(problem)
    elif observation.recipe is None:
        notes.append("the recipe is withheld: the update was taken for one plain gradient")
    return tuple(notes)


def _order_notes(problem: Problem) -> list[str]:
    """What was supposed about the order of the client's images, which the update does not show."""
    recipe = problem.simulate
    if recipe is None or recipe.update == "gradient" or problem.steps == 1:
        return []
    if problem.copies > 1:
        return [f"the order of images was left open: every one of {problem.copies} epochs had images of its own"]
    if recipe.shuffle and recipe.epochs > 1:
        return ["the client shuffles, but candidates were trained in the same order in every epoch"]
    return []
