"""Runs the example in FLARE's simulator: `python examples/flare/run.py simulate | defended | gate | all`.

Two sites train a LeNet on brain MRI; the server records. `simulate`: no site has a policy. `defended`: a site's own
`local/privacy.json` vets what comes, clips and adds noise. `gate`: it vets and reads every update as an attacker would
before it leaves. Everything stays below `--out` (default out/flare), on loopback, and ends with this command.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
BRAIN = HERE.parent / "flower"
"""Where the model and the images of the examples are."""

CASES = ("simulate", "defended", "gate")
SITES = ("site-1", "site-2")
MODEL = {"model": "brain.task:initial_model", "image_shape": [1, 32, 32]}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*CASES, "all"])
    parser.add_argument("--out", type=Path, default=Path("out/flare"), help="output folder")
    parser.add_argument("--data", default="", help="folder of brain MRI (glioma, meningioma, no_tumor, pituitary)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--noise", type=float, default=0.01, help="standard deviation of the defended sites' noise")
    parser.add_argument("--timeout", type=int, default=600, help="seconds after which a run is given up")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.out = arguments.out.resolve()
    arguments.data = str(Path(arguments.data).resolve()) if arguments.data else ""
    sys.path[:0] = [str(HERE), str(BRAIN)]
    if arguments.here:
        return simulated(arguments.what, arguments)
    for name in CASES if arguments.what == "all" else (arguments.what,):
        run(name, arguments)
    return 0


def run(name: str, arguments: argparse.Namespace) -> None:
    """One training in a process of its own, and the truth of its sites for those who own it."""
    for folder in (recording(name, arguments), arguments.out / "work" / name, arguments.out / f"{name}-sites"):
        shutil.rmtree(folder, ignore_errors=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    command = [
        sys.executable, __file__, name, "--here", "--out", str(arguments.out), "--data", arguments.data, "--rounds",
        str(arguments.rounds), "--batch-size", str(arguments.batch_size), "--noise", str(arguments.noise),
    ]  # fmt: skip
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(HERE), str(BRAIN), os.environ.get("PYTHONPATH", "")]),
    }
    log, started = arguments.out / f"{name}.log", time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)
        try:
            code = process.wait(arguments.timeout)
        finally:
            stop(process)
    ended = "" if code == 0 else f", FLARE ended the job ({log})"
    print(f"{name}: {time.perf_counter() - started:.1f} s, {recording(name, arguments)}{ended}", flush=True)
    for line in decisions(name, arguments):
        print(f"  {line}", flush=True)
    if not recording(name, arguments).is_dir():
        raise SystemExit(f"nothing was recorded; the log is {log}")
    write_truth(name, arguments)


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the simulator's processes, all of one session, if any are left."""
    import signal

    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            return
        time.sleep(1)


def simulated(name: str, arguments: argparse.Namespace) -> int:
    """The job and the simulator, in this process."""
    from brain.task import initial_model
    from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
    from nvflare.recipe import SimEnv

    from medpfl.integrations.flare import RecordingFilter

    words = f"--batch-size {arguments.batch_size}" + (f" --data {arguments.data}" if arguments.data else "")
    job = FedAvgRecipe(
        name=name,
        min_clients=len(SITES),
        num_rounds=arguments.rounds,
        model=initial_model(),
        train_script=str(HERE / "train.py"),
        train_args=words,
    )
    recorder = RecordingFilter(
        str(recording(name, arguments)), images_per_step=arguments.batch_size, defense=in_words(name, arguments)
    )
    job.add_server_output_filter(recorder, tasks=["train"])
    job.add_server_input_filter(recorder, tasks=["train"])
    site_policy(name, arguments)
    job.execute(SimEnv(clients=list(SITES), workspace_root=str(arguments.out / "work")))
    return 0


def site_policy(name: str, arguments: argparse.Namespace) -> None:
    """What the sites enforce, in the `local` folder that the simulator copies to each of them."""
    from medpfl.integrations.flare import DefenseFilter, GateFilter, VettingFilter, write_policy

    folder = str(arguments.out / f"{name}-sites" / "{site}")
    images = {
        "images": "images:site_images",
        "images_arguments": {"data": arguments.data, "count": arguments.batch_size},
    }
    if name == "defended":
        parts = [{"name": "clip", "bound": 1.0}, {"name": "gaussian", "std": arguments.noise}]
        leaves = DefenseFilter(folder, {"compose": parts}, **MODEL)
    elif name == "gate":
        recipe = {"batch_size": arguments.batch_size, "learning_rate": 0.1}
        leaves = GateFilter(folder, recipe=recipe, **MODEL, **images)
    else:
        return
    write_policy(arguments.out / "work" / name / "local", [VettingFilter(folder, **MODEL), leaves])


def in_words(name: str, arguments: argparse.Namespace) -> str:
    return f"clip to 1, Gaussian noise of {arguments.noise:g}" if name == "defended" else ""


def recording(name: str, arguments: argparse.Namespace) -> Path:
    return Path(arguments.out / name)


def decisions(name: str, arguments: argparse.Namespace) -> list[str]:
    """What the sites' filters decided, from their own logs."""
    found = []
    for path in sorted((arguments.out / f"{name}-sites").glob("*/guards.jsonl")):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            found.append(f"{path.parent.name}: {entry['decided_by']} {entry['outcome']} {'; '.join(entry['reasons'])}")
    return found


def write_truth(name: str, arguments: argparse.Namespace) -> None:
    """What the sites held, under the names under which the recording has them."""
    import numpy as np
    from images import site_images

    from medpfl.federation.recording import read_recording

    folder = recording(name, arguments).with_name(f"{name}-truth")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for update in read_recording(recording(name, arguments)).updates:
        images, labels = site_images(update.client, update.round, data=arguments.data, count=arguments.batch_size)
        np.savez(folder / f"{update.client}-round-{update.round}.npz", images=images.numpy(), labels=labels.numpy())


if __name__ == "__main__":
    raise SystemExit(main())
