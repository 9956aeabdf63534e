"""What a site enforces outside of apps: its mods stand around every app, and without them nothing is trained."""

from __future__ import annotations

import json
import os
import subprocess
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("flwr")

from flwr.clientapp import ClientApp
from flwr.supernode.runtime import run_clientapp as runtime

from medpfl.defenses import Clip
from medpfl.integrations.flower import AuditLog, DefenseMod, PinsMod, site


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Loads an app as Flower's own runtime does, after `enforce`."""
    apps: list[Any] = []
    taken: list[Any] = []

    def take(*_: Any) -> Any:
        taken.append(apps[0])
        return apps[0]

    monkeypatch.setattr(ClientApp, "__call__", ClientApp.__call__)
    monkeypatch.setattr(runtime, "get_load_client_app_fn", lambda *_, **__: take)

    def load(app: Any, mods: list[Any]) -> Any:
        apps.append(app)
        site.enforce(mods)
        return runtime.get_load_client_app_fn("app", None, False)("", "", "")

    return load, taken


def change(reply: Any, before: dict[str, torch.Tensor]) -> float:
    after = reply.content.array_records["arrays"].to_torch_state_dict()
    return float(torch.cat([(after[name] - one).flatten() for name, one in before.items()]).norm())


BEFORE = {"w": torch.zeros(4), "b": torch.zeros(2)}
AFTER = {name: tensor + 3.0 for name, tensor in BEFORE.items()}


class Stubborn(ClientApp):
    """An app that brings a call of its own, past Flower's."""

    def __init__(self, app: Any) -> None:
        super().__init__()
        self.app = app

    def __call__(self, message: Any, context: Any) -> Any:
        return self.app(message, context)


@pytest.mark.parametrize("kind", ["plain", "stubborn"])
def test_the_sites_defense_is_applied_once_whatever_the_app_lists(
    loaded: Any, instruct: Any, context: Any, answer: Any, kind: str
) -> None:
    plain = ClientApp()
    plain.train()(answer(AFTER))
    app = plain if kind == "plain" else Stubborn(plain)
    calls: list[int] = []

    def counted(message: Any, context: Any, call_next: Any) -> Any:
        calls.append(1)
        return call_next(message, context)

    load, taken = loaded
    run = load(app, [counted, DefenseMod(Clip(bound=0.5))])
    assert change(run(instruct(BEFORE), context), BEFORE) == pytest.approx(0.5, rel=1e-4)
    assert (len(calls), taken) == (1, [app])
    assert change(plain(instruct(BEFORE), context), BEFORE) == pytest.approx(0.5, rel=1e-4)


def test_a_refusal_reaches_the_sites_log_and_the_app_is_not_called(
    loaded: Any, instruct: Any, context: Any, tmp_path: Path
) -> None:
    app = ClientApp()
    app.train()(lambda *_: pytest.fail("trained"))
    log = AuditLog(tmp_path / "log.jsonl")
    load, _ = loaded
    reply = load(app, [PinsMod(examples=8, fewest_examples=16, log=log)])(instruct(BEFORE), context)
    assert (reply.error.reason, reply.has_content()) == ("withheld", False)
    assert "fewer than the 16" in json.loads((tmp_path / "log.jsonl").read_text())["reasons"][0]


def test_without_mods_no_app_is_even_loaded(loaded: Any, instruct: Any, context: Any) -> None:
    app = ClientApp()
    app.train()(lambda *_: pytest.fail("trained"))
    load, taken = loaded
    assert load(app, [])(instruct(BEFORE), context).error.reason == "withheld"
    assert not taken
    assert app(instruct(BEFORE), context).has_error()


@pytest.mark.parametrize(
    ("named", "says"),
    [("", "is not set"), ("policy:absent", "no 'absent'"), ("policy:empty", "no list of mods"), ("policy:broken", "KeyError")],
)  # fmt: skip
def test_a_missing_or_broken_function_is_named_and_refuses_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], named: str, says: str
) -> None:
    (tmp_path / "policy.py").write_text("def empty():\n    return []\ndef broken():\n    raise KeyError('log')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(site.VARIABLE, named)
    enforced: list[Any] = []
    monkeypatch.setattr(site, "enforce", enforced.append)
    command = import_module("flwr.supernode.cli.flwr_clientapp")
    monkeypatch.setattr(command, "flwr_clientapp", lambda: None)
    site.main()
    assert enforced == [[]]
    said = capsys.readouterr().err
    assert says in said
    assert "nothing is trained" in said


def test_the_command_of_a_site_stands_before_flowers_own_on_the_path(tmp_path: Path) -> None:
    folder = site.site_folder(tmp_path / "site")
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, site.VARIABLE: ""}
    ran = subprocess.run(
        ["flwr-clientapp", "--help"], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert f"{site.VARIABLE} is not set" in ran.stderr
    assert ran.returncode == 0
