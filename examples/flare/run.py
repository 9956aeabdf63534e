"""Runs the example in FLARE's simulator: `python examples/flare/run.py simulate | defended | gate | policy | all`.

Two sites train a LeNet on brain MRI; the server records. `simulate`: no site filters anything. `defended`: the sites vet
what comes, clip and add noise. `gate`: they vet and read every update as an attacker would before it leaves. `policy`: as
`defended`, but enforced by the sites' own `privacy.json`, with a filter of the job that says what it saw. Everything stays below `--out` (default out/flare), on loopback, and ends with this command.
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
from typing import Any

HERE = Path(__file__).resolve().parent
BRAIN = HERE.parent / "flower"
"""Where the model and the images of the examples are."""

CASES = ("simulate", "defended", "gate", "policy")
SITES = ("site-1", "site-2")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*CASES, "all"])
    parser.add_argument("--out", type=Path, default=Path("out/flare"), help="output folder")
    parser.add_argument("--data", default="", help="folder of brain MRI (glioma, meningioma, no_tumor, pituitary)")
    parser.add_argument(
        "--net", choices=["lenet", "dense"], default="lenet", help="dense: images stand in its gradient"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--noise", type=float, default=0.01, help="standard deviation of the defended sites' noise")
    parser.add_argument("--timeout", type=int, default=600, help="seconds after which a run is given up")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.data and not Path(arguments.data).is_dir():
        parser.error(f"--data '{arguments.data}': no such folder; leave it out for drawn images")
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
        str(arguments.rounds), "--batch-size", str(arguments.batch_size), "--net", arguments.net, "--noise", str(arguments.noise),
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
    if name == "policy":
        print_order(name, arguments)
    write_truth(name, arguments)


def print_order(name: str, arguments: argparse.Namespace) -> None:
    """In which order filters ran on what left, and what the job's own filter saw, from what reached the server."""
    from medpfl.federation.recording import read_recording

    for update in read_recording(recording(name, arguments)).updates:
        total = sum(float(tensor.double().sum()) for tensor in update.tensors.values())
        order, seen = " -> ".join(update.config["filter_history"]), update.config["seen_by_the_job"]
        print(f"  round {update.round}, {update.client}: {order}; sum seen by the job {seen:.6f}, recorded {total:.6f}")


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
    """The job and the simulator, in this process; 0 if FLARE says that all went well."""
    from nvflare import FilterType
    from nvflare.app_opt.pt.job_config.fed_avg import FedAvgJob
    from nvflare.job_config.script_runner import ScriptRunner
    from parts import JobFilter, RealPolicy
    from sites import NETS

    from medpfl.integrations.flare import RecordingFilter, write_policy

    job = FedAvgJob(NETS[arguments.net](), n_clients=len(SITES), num_rounds=arguments.rounds, name=name, key_metric="")
    job.set_app_packages(["medpfl", "brain", "parts", "sites"])
    words = f"--net {arguments.net} --batch-size {arguments.batch_size}" + (
        f" --data {arguments.data}" if arguments.data else ""
    )
    job.to_clients(ScriptRunner(script=str(HERE / "train.py"), script_args=words), tasks=["train"])
    recorder = RecordingFilter(
        str(recording(name, arguments)), images_per_step=arguments.batch_size, defense=in_words(name, arguments)
    )
    for kind in (FilterType.TASK_DATA, FilterType.TASK_RESULT):
        job.to_server(recorder, filter_type=kind, tasks=["train"])
    filters, work = site_filters(name, arguments), arguments.out / "work" / name
    if name == "policy":
        write_policy(work / "local", filters)  # the simulator copies it to each site
        job.to_clients(RealPolicy(), id="real_policy")
        job.to_clients(JobFilter(), filter_type=FilterType.TASK_RESULT, tasks=["train"])
    else:
        for one, kind in zip(filters, (FilterType.TASK_DATA, FilterType.TASK_RESULT), strict=False):
            job.to_clients(one, filter_type=kind, tasks=["train"])
    return int(job.simulator_run(str(work), clients=list(SITES)) or 0)


def site_filters(name: str, arguments: argparse.Namespace) -> list[Any]:
    """What the sites do with what comes and with what leaves."""
    from sites import NAMES

    from medpfl.integrations.flare import DefenseFilter, GateFilter, VettingFilter

    folder = str(arguments.out / f"{name}-sites" / "{site}")
    model = {"model": NAMES[arguments.net], "image_shape": [1, 32, 32]}
    images = {
        "images": "sites:site_images",
        "images_arguments": {"data": arguments.data, "count": arguments.batch_size},
    }
    if name in ("defended", "policy"):
        parts = [{"name": "clip", "bound": 1.0}, {"name": "gaussian", "std": arguments.noise}]
        return [VettingFilter(folder, **model), DefenseFilter(folder, {"compose": parts}, **model)]
    if name == "gate":
        recipe = {"batch_size": arguments.batch_size, "learning_rate": 0.1}
        return [VettingFilter(folder, **model), GateFilter(folder, recipe=recipe, **model, **images)]
    return []


def in_words(name: str, arguments: argparse.Namespace) -> str:
    return f"clip to 1, Gaussian noise of {arguments.noise:g}" if name in ("defended", "policy") else ""


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
    from sites import site_images

    from medpfl.federation.recording import read_recording

    folder = recording(name, arguments).with_name(f"{name}-truth")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for update in read_recording(recording(name, arguments)).updates:
        images, labels = site_images(update.client, update.round, data=arguments.data, count=arguments.batch_size)
        np.savez(folder / f"{update.client}-round-{update.round}.npz", images=images.numpy(), labels=labels.numpy())


if __name__ == "__main__":
    raise SystemExit(main())
