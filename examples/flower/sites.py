"""The part of the example that shows a site's own policy: an app without mods, and what leaves the sites all the same."""

from __future__ import annotations

import json
import os
import shutil
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

APP = Path(__file__).resolve().parent
POLICIES = ("policy:clipped", "policy:too_few", "policy:missing")
"""What the three SuperNodes name; the last one is not there."""


def bare_app(folder: Path) -> Path:
    """A copy of the app whose client lists no mod."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(APP / "brain", folder / "brain", ignore=shutil.ignore_patterns("__pycache__"))
    text = (APP / "pyproject.toml").read_text()
    (folder / "pyproject.toml").write_text(text.replace("brain.client_app:app", "brain.bare:app"))
    return folder


def site_environments(environment: dict[str, str], out: Path) -> list[dict[str, str]]:
    """The environment of each SuperNode: its policy, its log, and the command that enforces the policy first on PATH."""
    from medpfl.integrations.flower.site import VARIABLE, site_folder

    out.mkdir(parents=True, exist_ok=True)
    command = site_folder(out / "command")
    found = []
    for policy in POLICIES:
        log = site_log(out, policy)
        log.unlink(missing_ok=True)
        path = f"{command}{os.pathsep}{environment['PATH']}"
        found.append({**environment, "PATH": path, VARIABLE: policy, "SITE_LOG": str(log)})
    return found


def site_log(out: Path, policy: str) -> Path:
    return out / f"{policy.partition(':')[2]}.jsonl"


def length(after: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> float:
    return sum(float((after[name] - one).square().sum()) for name, one in before.items()) ** 0.5


def first_site_trains(number: int, sent: Mapping[str, Tensor], settings: Mapping[str, object]) -> Mapping[str, Tensor]:
    """What the app of the first site makes of a model before any policy, computed again."""
    from brain.client_app import trained

    told = tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    context: Any = SimpleNamespace(run_config={**told, **settings}, node_config={"partition-id": 0})
    model, _, _ = trained(context, number, lambda model: model.load_state_dict(dict(sent)))
    return model.state_dict()


def tell(recording: Path, out: Path, settings: Mapping[str, object]) -> None:
    """What left each site, beside what its training makes without a policy, and what the sites' own logs say."""
    from medpfl.federation.recording import read_recording

    found = read_recording(recording)
    for update in found.updates:
        sent = found.sent_to(update)
        if sent is not None:
            left = length(update.tensors, sent.tensors)
            made = length(first_site_trains(update.round, sent.tensors, settings), sent.tensors)
            print(
                f"round {update.round}: node {update.client} sent a change of norm {left:.4f}, its training made {made:.4f}"
            )
    for problem in found.problems:
        print(f"server's recording: {problem}")
    for policy in POLICIES:
        log = site_log(out, policy)
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        said = sorted({f"{line['decided_by']} {line['outcome']} ({'; '.join(line['reasons'])})" for line in lines})
        print(f"log of the site with {policy}, {len(lines)} lines: {' | '.join(said) or 'nothing was trained'}")
