"""What cases are made of: the same for the same spec, whatever surrounds it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from medpfl.audit.grid import cells
from medpfl.audit.plan import Plan
from medpfl.audit.preparation import prepare
from medpfl.audit.spec import parse_spec

DATA = {"name": "brain", "reader": "phantom", "size": 32, "count": 96, "victims": 2}


def test_a_trained_model_does_not_depend_on_the_threads_of_the_process(tmp_path: Path) -> None:
    plain: dict[str, Any] = {"data": [DATA], "models": [{"name": "lenet_dlg", "state": {"trained": {"epochs": 2}}}]}
    spec = parse_spec(plain, base=tmp_path)
    (cell,) = cells(spec)
    before = torch.get_num_threads()
    trained = []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            materials = prepare(spec, tmp_path / str(threads), Plan()).materials
            trained.append(materials.model(cell.dataset, cell.model, 0).parameters)
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(trained[0][name], trained[1][name]) for name in trained[0])
