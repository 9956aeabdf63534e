"""Settings of axis entries as phrases: what a reader must know to judge a number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

from medpfl.attacks import ATTACKS
from medpfl.attacks.crafted import CraftedAttack
from medpfl.core.domain import KNOWLEDGE, Recipe
from medpfl.report.formatting import count, listed
from medpfl.report.views import NOTHING_THERE, Cell

Params = Mapping[str, Any]

SETTING_AXES = ("dataset", "model", "recipe", "threat_model", "channel")
"""What stays the same where only attack and defense differ."""

_ADVERSARIES = {
    "eavesdropper": "an eavesdropper who reads the messages of one client",
    "honest_server": "a server that follows the protocol and is curious about what it receives",
    "malicious_server": "a malicious server that may change what it sends",
}
_CAPABILITIES = {
    "parameters": "the tensors it sends",
    "architecture": "the architecture it sends",
    "inconsistent_models": "which model each client gets",
    "recipe": "learning rate and local steps",
    "secure_aggregation": "clipping and quantization of the aggregation",
}
_CHANNELS = {
    "secure_sum": ", so that only their mean arrives",
    "secagg_plus": ", so that only their mean arrives, clipped and rounded",
}
_STATES = {
    "untrained": "untrained",
    "untrained_per_victim": "untrained, with new weights for every victim",
    "imagenet": "with weights from ImageNet, never trained on medical images",
}
_DEFAULT_RECIPE = Recipe()


def adversary(cell: Cell) -> str:
    """Who attacks, what it may change and what it was granted.

    >>> adversary(Cell("c", {"threat_model": "eavesdropper"}))
    'an eavesdropper who reads the messages of one client'
    """
    identifier, params = _entry(cell, "threat_model")
    name = str(params.get("name", identifier))
    text = _ADVERSARIES.get(name, f"the threat model {identifier}")
    if may := [_CAPABILITIES.get(part, part) for part in _strings(params.get("can"))]:
        text = f"{text} ({listed(may)})"
    if knows := [KNOWLEDGE.get(part, part) for part in _strings(params.get("knows"))]:
        text = f"{text} and was granted {listed(knows)}"
    if withheld := _strings(params.get("withhold")):
        text = f"{text}, without knowing {listed(withheld)}"
    return text


def model_state(params: Params) -> str:
    """The state of the model's weights, with no folder of a checkpoint.

    >>> model_state({"state": {"trained": {"epochs": 5, "victims": "included"}}})
    'trained for 5 epochs, victims included'
    """
    state = params.get("state")
    if isinstance(state, Mapping):
        training = state.get("trained")
        training = training if isinstance(training, Mapping) else {}
        epochs = training.get("epochs")
        text = f"trained for {count(epochs, 'epoch')}" if isinstance(epochs, int) else "trained"
        return f"{text}, victims {'included' if training.get('victims') == 'included' else 'not among the images'}"
    if state is None:
        return ""
    return _STATES.get(str(state), f"from the checkpoint {_file_name(str(state))}")


def model(cell: Cell) -> str:
    """The model and the state of its weights."""
    identifier, params = _entry(cell, "model")
    state = model_state(params)
    return f"{identifier} ({state})" if state else identifier


def sent(cell: Cell) -> str:
    """What the client sends, computed from how many images, and the batch-norm mode.

    >>> sent(Cell("c", {"recipe": "r"}, {"recipe": {"update": "gradient", "batch_size": 1}}))
    'the gradient of 1 image, batch norm in eval mode'
    """
    identifier, params = _entry(cell, "recipe")
    if not params:
        return f"what the recipe {identifier} sends"
    setting = {name: params.get(name, getattr(_DEFAULT_RECIPE, name)) for name in _RECIPE_KEYS}
    batch, steps, epochs = (int(setting[name]) for name in ("batch_size", "local_steps", "epochs"))
    images = params.get("images")
    images = images if isinstance(images, int) else batch * steps
    if setting["update"] == "gradient":
        text = f"the gradient of {count(images, 'image')}"
    else:
        kind = "the change of its weights" if setting["update"] == "delta" else "its new weights"
        text = (
            f"{kind} after {count(steps * epochs, 'local step')} on {count(images, 'image')} "
            f"(batch size {batch}, {setting['optimizer']}, learning rate {setting['learning_rate']:g})"
        )
    if setting["precision"] != "float32":
        text = f"{text} in {setting['precision']}"
    return f"{text}, batch norm in {setting['batch_norm']} mode"


_RECIPE_KEYS = (
    "update", "batch_size", "local_steps", "epochs", "optimizer", "learning_rate", "batch_norm", "precision",
)  # fmt: skip


def channel(cell: Cell) -> str:
    """What lies between client and server.

    >>> channel(Cell("c", {"channel": "plain"}))
    'no secure aggregation'
    """
    identifier, params = _entry(cell, "channel")
    name = str(params.get("name", identifier))
    if name in NOTHING_THERE or name == "plain":
        return "no secure aggregation"
    clients = params.get("clients")
    text = f"{identifier} over {count(clients, 'client')}" if isinstance(clients, int) else identifier
    return f"{text}{_CHANNELS.get(name, '')}"


def crafted(cell: Cell) -> str:
    """What the server sent in place of the agreed model; empty where the attack sends nothing of its own.

    >>> crafted(Cell("c", {"attack": "medleak"}))[:15], crafted(Cell("c", {"attack": "dlg"}))
    ('a crafted model', '')
    """
    identifier, params = _entry(cell, "attack")
    name = str(params.get("name", identifier))
    attack = ATTACKS[name].item if name in ATTACKS else None
    return attack.sends if attack is not None and issubclass(attack, CraftedAttack) else ""


def defense(cell: Cell) -> str:
    """The defense, and the guard if there is one.

    >>> defense(Cell("c", {"defense": "laplace-100", "guard": "none"})), defense(Cell("c", {"defense": "none"}))
    ('laplace-100', 'no defense')
    """
    identifier, params = _entry(cell, "defense")
    named = str(params.get("name", identifier)) in NOTHING_THERE
    parts = [] if named else [identifier]
    guard = cell.axes.get("guard", "")
    if guard not in NOTHING_THERE:
        parts.append(f"guard {guard}")
    return " with ".join(parts) or "no defense"


def setting_key(cell: Cell) -> tuple[str, ...]:
    """What must be equal for two cells to differ in attack and defense only."""
    return tuple(cell.axes.get(axis, "") for axis in SETTING_AXES)


def varying_axes(cells: Sequence[Cell]) -> list[str]:
    """Axes of the setting in which these cells differ."""
    return [axis for axis in SETTING_AXES if len({cell.axes.get(axis, "") for cell in cells}) > 1]


def _entry(cell: Cell, axis: str) -> tuple[str, Params]:
    return cell.axes.get(axis, ""), cell.params.get(axis, {})


def _strings(value: object) -> list[str]:
    return (
        [str(part) for part in value] if isinstance(value, (list, tuple)) else [value] if isinstance(value, str) else []
    )


def _file_name(path: str) -> str:
    return PureWindowsPath(PurePosixPath(path).name).name
