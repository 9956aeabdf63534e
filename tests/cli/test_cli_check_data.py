"""What `medpfl check` says of data before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

Medpfl = Callable[..., Any]
WriteSpec = Callable[..., Path]


def test_images_that_belong_to_nobody_are_counted_for_every_entry(
    medpfl: Medpfl, write_spec: WriteSpec, tmp_path: Path
) -> None:
    drawn = {"reader": "phantom", "size": 16, "seed": 4, "patients": 12}
    data = [
        {**drawn, "name": "here", "count": 24, "victims": 3},
        {**drawn, "name": "there", "count": 36, "victims": 0},
    ]
    knows = [{"auxiliary": "there"}]
    path = write_spec(tmp_path, data=data, threat_models=[{"name": "honest_server", "knows": knows}])
    ended = medpfl("check", path)
    said = " ".join(ended.out.split())
    assert ended.code == 0
    assert "here: 24 images, 3 victims" in said
    assert "3 of the victims' patients" in said
    assert "there: 36 images, 0 victims" in said
    assert "9 of the victims' patients" in said
    assert "Auxiliary knowledge of adversaries who attack 'here'." in said
