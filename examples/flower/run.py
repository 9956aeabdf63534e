"""Runs the example: `python examples/flower/run.py simulate | noise | gate | secure | deploy | site | all`.

Everything stays below `--out` (default out/flower): recordings, truth for the report, the server's own images, and
Flower's files. Servers listen on loopback only and are stopped by their process ids when the command ends. `--set`
changes what the app is told, e.g. `--set images=16 batch-size=4 local-steps=4`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

APP = Path(__file__).resolve().parent
sys.path.insert(0, str(APP))
from servers import free_port, server_commands, wait_for  # noqa: E402  the example's own folder comes first
from sites import bare_app, site_environments, tell  # noqa: E402
from truth import write_pool, write_truth  # noqa: E402

SETTINGS = {
    "simulate": {},
    "plain": {"recorder": False},
    "noise": {"noise": 0.01, "bound": 1.0},
    "gate": {"gate": True},
    "secure": {"secure-aggregation": True},
    "deploy": {"clients": 2},
    "site": {"clients": 3},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*SETTINGS, "all"])
    parser.add_argument("--out", type=Path, default=Path("out/flower"), help="output folder")
    parser.add_argument("--data", default="", help="folder of brain MRI (glioma, meningioma, no_tumor, pituitary)")
    parser.add_argument("--name", default="", help="name of the recording (default: what is run)")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other settings of the app")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--timeout", type=int, default=600, help="seconds after which a run is given up")
    arguments = parser.parse_args()
    if arguments.data and not Path(arguments.data).is_dir():
        parser.error(f"--data '{arguments.data}': no such folder; leave it out for drawn images")
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    chosen = [name for name in SETTINGS if name != "plain"] if arguments.what == "all" else [arguments.what]
    for name in chosen:
        run(name, out, arguments)
    return 0


def run(name: str, out: Path, arguments: argparse.Namespace) -> None:
    """One training, and the truth of its clients for those who own it."""
    recording = out / (arguments.name or name)
    if recording.exists():
        shutil.rmtree(recording)
    settings = {
        **SETTINGS[name],
        "num-server-rounds": arguments.rounds,
        "recording": str(recording),
        "data": str(Path(arguments.data).resolve()) if arguments.data else "",
        **{key: json.loads(value) for key, _, value in (one.partition("=") for one in arguments.set)},
    }
    environment = flower_environment(out / f"{recording.name}-home", port=free_port())
    started = time.perf_counter()
    if name == "site":
        sites = out / "sites"
        deployed(
            settings, environment, arguments.timeout, bare_app(out / "bare-app"), site_environments(environment, sites)
        )
        tell(recording, sites, settings)
    elif name == "deploy":
        deployed(settings, environment, arguments.timeout, APP, [environment] * 2)
    else:
        simulated(settings, environment, arguments.timeout)
    print(f"{name}: {time.perf_counter() - started:.1f} s, {recording}", flush=True)
    if recording.is_dir():
        told = {**defaults(), **settings}
        write_truth(recording, told)
        write_pool(out / f"{recording.name}-pool", told)


def defaults() -> dict[str, object]:
    """What the app is told unless a run says otherwise."""
    return dict(tomllib.loads((APP / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"])


def flower_environment(home: Path, port: int) -> dict[str, str]:
    """Flower's files in a folder of their own, nothing sent home, nothing installed."""
    home.mkdir(parents=True, exist_ok=True)
    return {
        **os.environ,
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port),
        "FLWR_LOCAL_CONTROL_API_PORT": str(port + 1),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}",
    }


def config_text(settings: dict[str, object]) -> str:
    return " ".join(f"{key}={json.dumps(value)}" for key, value in settings.items())


def simulated(settings: dict[str, object], environment: dict[str, str], timeout: int) -> None:
    """`flwr run` on the local simulation runtime; the SuperLink that it leaves behind is stopped."""
    command = [
        "flwr", "run", str(APP), "local", "--stream", "--run-config", config_text(settings),
        "--federation-config", "num-supernodes=4 client-resources-num-cpus=1 init-args-num-cpus=2",
    ]  # fmt: skip
    try:
        flwr(command, environment, timeout)
        check_finished(environment, "local")
    finally:
        stop(environment["FLWR_HOME"])


def deployed(
    settings: dict[str, object], environment: dict[str, str], timeout: int, app: Path, sites: list[dict[str, str]]
) -> None:
    """A SuperLink and a SuperNode per site (its environment) as processes of their own on loopback."""
    port, nodes = free_port(), []
    config = Path(environment["FLWR_HOME"]) / "config.toml"
    text = config.read_text() if config.exists() else ""
    if "[superlink.deploy]" not in text:
        head = (
            ""
            if "[superlink]" in text
            else '[superlink]\ndefault = "local"\n\n[superlink.local]\naddress = ":local:"\n'
        )
        config.write_text(f'{text}{head}\n[superlink.deploy]\naddress = "127.0.0.1:PORT"\ninsecure = true\n')
    text = config.read_text()
    config.write_text("\n".join(
        f'address = "127.0.0.1:{port}"' if line.startswith('address = "127.0.0.1') else line for line in
        text.replace("127.0.0.1:PORT", f"127.0.0.1:{port}").splitlines()) + "\n")  # fmt: skip
    log = (Path(environment["FLWR_HOME"]) / "deploy.log").open("w")
    commands = server_commands(f"127.0.0.1:{port}", len(sites), environment)
    try:
        for command, own in zip(commands, [environment, *sites], strict=True):
            nodes.append(
                subprocess.Popen(command, env=own, cwd=APP / "policies", stdout=log, stderr=log, start_new_session=True)
            )
            wait_for(f"127.0.0.1:{port}")
        flwr(
            ["flwr", "run", str(app), "deploy", "--stream", "--run-config", config_text(settings)], environment, timeout
        )
        check_finished(environment, "deploy")
    finally:
        for process in reversed(nodes):
            os.killpg(process.pid, signal.SIGTERM)
        for process in nodes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
        stop(environment["FLWR_HOME"])
        log.close()


def flwr(command: list[str], environment: dict[str, str], timeout: int) -> None:
    finished = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout, check=False)
    (Path(environment["FLWR_HOME"]) / "run.log").write_text(finished.stdout + finished.stderr)
    if finished.returncode:
        raise SystemExit(f"flwr run failed:\n{finished.stdout[-3000:]}{finished.stderr[-3000:]}")


def check_finished(environment: dict[str, str], connection: str) -> None:
    """`flwr run` ends with 0 even where the server app raised, so its status is asked for."""
    listed = subprocess.run(
        ["flwr", "list", connection, "--format", "json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    start = listed.stdout.find("{")
    runs = json.loads(listed.stdout[start:]).get("runs", []) if start >= 0 else []
    status = str(runs[0].get("status", "")) if runs else "unknown"
    if "finished:completed" not in status:
        log = (Path(environment["FLWR_HOME"]) / "run.log").read_text()[-4000:]
        raise SystemExit(f"the run ended as {status}:\n{log}")


def stop(home: str, seconds: float = 20.0) -> None:
    """Ends what Flower left running for this run, whatever it is called; that of other runs is left alone."""
    import psutil

    own = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.pid != os.getpid() and process.environ().get("FLWR_HOME") == home:
                own.append(process)
    for process in own:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    for process in psutil.wait_procs(own, timeout=seconds)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


if __name__ == "__main__":
    raise SystemExit(main())
