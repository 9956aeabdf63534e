"""The server: federated averaging inside MedPFL's recorder, or SecAgg+ where the run asks for it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from brain.task import held_out, initial_model, judge
from medpfl.federation.recording import About, Recorder
from medpfl.integrations.flower import RecordingStrategy

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Trains and writes the utility of each round beside the recording."""
    config = context.run_config
    folder, rounds, clients = Path(str(config["recording"])), int(config["num-server-rounds"]), int(config["clients"])
    images, labels = held_out(str(config["data"]), int(config["seed"]))
    history: list[dict[str, float]] = []
    started = time.perf_counter()

    def judged(number: int, state: Mapping[str, Any]) -> dict[str, float]:
        model = initial_model()
        model.load_state_dict(dict(state))
        found = judge(model, images, labels)
        history.append({"round": number, "seconds": time.perf_counter() - started, **found})
        return found

    initial = initial_model(int(config["seed"])).state_dict()
    noise = float(config["noise"])
    about = About(
        source="flower",
        channel="secagg_plus" if config["secure-aggregation"] else "plain",
        defense=f"clip to {config['bound']}, Gaussian noise of {noise:g}" if noise > 0 else "",
    )
    if config["secure-aggregation"]:
        from medpfl.integrations.flower.secagg import run_secure_rounds

        recorder = Recorder(folder, about)
        run_secure_rounds(
            grid, context, initial, recorder,
            rounds=rounds, clients=clients, evaluate=judged, max_weight=float(config["images"]),
        )  # fmt: skip
    else:
        strategy: Any = FedAvg(
            fraction_train=1.0, fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients
        )
        if config["recorder"]:
            strategy = RecordingStrategy(strategy, folder, about=about)
        strategy.start(
            grid=grid,
            initial_arrays=ArrayRecord(initial),
            num_rounds=rounds,
            evaluate_fn=lambda number, arrays: MetricRecord(judged(number, arrays.to_torch_state_dict())),
        )
    folder.with_name(f"{folder.name}.utility.json").write_text(json.dumps(history, indent=2))
