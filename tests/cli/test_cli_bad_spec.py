"""A bad spec at the command line: one line that says where, what and a way out; exit code 2."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FILMS = {"name": "films", "reader": "phantom", "kind": "chest", "count": 30, "size": 16, "victims": 2}
Medpfl = Callable[..., Any]
WriteSpec = Callable[..., Path]


def films(**changes: Any) -> dict[str, Any]:
    return {"data": [{**FILMS, **changes}]}


SPECS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "key": ({"atacks": []}, ("unknown key 'atacks'", "did you mean 'attacks'")),
    "data key": (films(victms=3), ("data[0]", "'victms'", "did you mean 'victims'")),
    "model key": ({"models": [{"name": "lenet_dlg", "stat": "x"}]}, ("models[0]", "'stat'", "'state'")),
    "recipe key": ({"recipes": [{"bach_size": 1}]}, ("recipes[0]", "did you mean 'batch_size'")),
    "knowledge key": ({"threat_models": [{"name": "eavesdropper", "know": []}]}, ("threat_models[0]", "'knows'")),
    "channel key": ({"channels": [{"name": "plain", "clients": 8}]}, ("channels[0]", "unknown key 'clients'")),
    "defense key": ({"defenses": [{"name": "laplace", "scal": 1}]}, ("defenses[0]", "did you mean 'scale'")),
    "attack key": ({"attacks": [{"name": "dlg", "iteration": 1}]}, ("attacks[0]", "did you mean 'iterations'")),
    "training key": (
        {"models": [{"name": "lenet_dlg", "state": {"trained": {"epoch": 1}}}]},
        ("models[0].state.trained", "did you mean 'epochs'"),
    ),
    "reader name": (films(reader="phantm"), ("data[0].reader", "did you mean 'phantom'")),
    "model name": ({"models": ["lenet_dgl"]}, ("models[0]", "did you mean 'lenet_dlg'")),
    "threat model name": ({"threat_models": ["eavesdroper"]}, ("threat_models[0]", "did you mean 'eavesdropper'")),
    "knowledge name": (
        {"threat_models": [{"name": "eavesdropper", "knows": ["label"]}]},
        ("threat_models[0].knows", "did you mean 'labels'"),
    ),
    "channel name": ({"channels": ["plan"]}, ("channels[0]", "did you mean 'plain'")),
    "defense name": ({"defenses": ["lapalce"]}, ("defenses[0]", "did you mean 'laplace'")),
    "clients of a channel": (
        {"channels": [{"name": "secure_sum", "clients": 0}]},
        ("channels[0].clients", "greater than or equal to 1", "found 0"),
    ),
    "attack name": ({"attacks": ["dgl"]}, ("attacks[0]", "did you mean 'dlg'")),
    "preset name": ({"attacks": [{"name": "dlg", "preset": "quik"}]}, ("attacks[0].preset", "did you mean 'quick'")),
    "state name": ({"models": [{"name": "lenet_dlg", "state": "untraind"}]}, ("models[0].state", "'untrained'")),
    "guard": ({"guards": ["leakage_gat"]}, ("guards[0]", "did you mean 'leakage_gate'")),
    "only axis": ({"attacks": [{"name": "cpl", "only": {"modl": ["x"]}}]}, ("attacks[0].only", "'model'")),
    "only nothing": ({"attacks": [{"name": "cpl", "only": {"model": ["x"]}}]}, ("attacks[0].only.model", "nothing")),
    "only a text": ({"attacks": [{"name": "cpl", "only": {"model": "x"}}]}, ("attacks[0].only.model", "a list")),
    "no cell": ({"attacks": [{"name": "cpl", "only": {"model": []}}]}, ("no cell is left", "`only`")),
    "twice": ({"data": [FILMS, FILMS]}, ("data[1]", "'films'", "label")),
    "data a mapping": ({"data": FILMS}, ("data: expected a list", "found {")),
    "entry a number": ({"models": [3]}, ("models[0]: expected a mapping", "found 3")),
    "size a word": (films(size="big"), ("data[0].size: expected a whole number, or a list, found 'big'",)),
    "size 4": (films(size=4), ("data[0]: size 4: expected at least 11",)),
    "size 0": (films(size=0), ("data[0]: size 0: expected at least 11",)),
    "victims negative": (films(victims=-1), ("data[0].victims: expected a number greater than or equal to 0",)),
    "channels 2": (films(channels=2), ("data[0].channels: expected 1 or 3, found 2",)),
    "name a number": ({"recipes": [{"name": 3}]}, ("recipes[0].name: expected text, found 3",)),
    "id with slash": (films(label="a/b"), ("data[0]", "'a/b'", "letters")),
    "learning rate": (
        {"recipes": [{"update": "delta", "learning_rate": -1}]},
        ("recipes[0].learning_rate: expected a number greater than 0, found -1",),
    ),
    "noise not finite": (
        {"defenses": [{"name": "laplace", "scale": float("nan")}]},
        ("defenses[0].scale: expected a finite number, found nan",),
    ),
    "two wrong": (
        {"attacks": [{"name": "dlg", "iterations": "lots", "restarts": -1}]},
        ("attacks[0].iterations: expected a whole number, found 'lots' (and another wrong key)",),
    ),
    "check of several": (
        {"data": [{"reader": "dicom", "path": ".", "percentiles": [90, 10]}]},
        ("data[0]: percentiles [90.0, 10.0]: expected two rising numbers",),
    ),
    "knows a mapping": (
        {"threat_models": [{"name": "eavesdropper", "knows": [{"labels": 3}]}]},
        ("threat_models[0].knows", "labels"),
    ),
    "preset a list": ({"attacks": [{"name": "dlg", "preset": ["quick"]}]}, ("attacks[0].preset", "quick")),
    "seed negative": ({"seed": -1}, ("seeds", "found [-1]")),
    "seed for no store": ({"seed": 2**80}, ("seeds", "2**63")),
    "seed twice": ({"seeds": [1, 1]}, ("seeds", "[1, 1]")),
    "limit": ({"limit": "asr <<= 1"}, ("limit", "'asr <= 0.05'")),
    "limit column": ({"limit": "asf <= 1"}, ("limit", "did you mean 'asr'")),
    "threshold": ({"success_threshold": 3}, ("success_threshold", "(0, 1]", "found 3")),
    "factory form": ({"models": [{"factory": ".net:make"}]}, ("models[0].factory", "'package.module:callable'")),
    "normalize": (
        {"models": [{"name": "lenet_dlg", "normalize": {"mean": [0.5], "std": [0]}}]},
        ("model 'lenet_dlg'", "normalize", "above 0"),
    ),
    "victims": (films(victims=300), ("'films'", "30 images", "300 are needed", "fewer victims")),
    "path": ({"data": [{"reader": "folder", "path": "nowhere"}]}, ("'nowhere'", "does not exist")),
}


@pytest.mark.parametrize("case", SPECS)
def test_a_wrong_spec(case: str, medpfl: Medpfl, write_spec: WriteSpec, tmp_path: Path) -> None:
    changes, expected = SPECS[case]
    ended = medpfl("check", write_spec(tmp_path, **changes))
    ended.refused(*expected)
    assert ended.out == ""


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "found nothing"),
        (b"- a\n", "found a list"),
        (b"data: [a, b\nmodels: }\n", "line 2"),
        (b"data:\n\t- a\n", "line 2"),
        (b"data: []\ndata: []\n", "line 2, column 1: not valid YAML: the key 'data' comes twice"),
        (b"!!python/object/apply:os.getcwd []\n", "not valid YAML"),
        (bytes(range(256)), "UTF-8"),
        (b"\0", "not valid YAML"),
    ],
)
def test_a_file_that_is_no_spec(content: bytes, expected: str, medpfl: Medpfl, tmp_path: Path) -> None:
    path = tmp_path / "audit.yaml"
    path.write_bytes(content)
    medpfl("check", path).refused(path, expected)


def test_a_spec_that_is_not_there(medpfl: Medpfl, tmp_path: Path) -> None:
    medpfl("check", tmp_path / "audit.yaml", "--json").refused("audit.yaml: no such file", "medpfl init")
    medpfl("audit", tmp_path, "--out", tmp_path / "out").refused(tmp_path, "Is a directory")
