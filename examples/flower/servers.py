"""How servers are started, which Flower has changed: older ones listen on an address for each of their interfaces."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import time


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def free_address() -> str:
    return f"127.0.0.1:{free_port()}"


def wait_for(address: str, seconds: float = 90.0) -> None:
    """Until somebody listens there, or for that long."""
    host, _, port = address.partition(":")
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.suppress(OSError), socket.create_connection((host, int(port)), timeout=1.0):
            return
        time.sleep(0.2)


def server_commands(control: str, sites: int, environment: dict[str, str]) -> list[list[str]]:
    """A SuperLink that `flwr run` reaches at the address `control`, and a SuperNode per site."""
    told = subprocess.run(
        ["flower-superlink", "--help"], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    if "--host " not in told.stdout:
        fleet = free_address()
        link = [
            "--control-api-address",
            control,
            "--fleet-api-address",
            fleet,
            "--serverappio-api-address",
            free_address(),
        ]
        nodes = [["--superlink", fleet, "--clientappio-api-address", free_address()] for _ in range(sites)]
    else:
        host, _, port = control.partition(":")
        link = ["--disable-runtime-dependency-installation", "--host", host, "--port", port]
        nodes = [["--superlink", control, "--host", host, "--port", str(free_port())] for _ in range(sites)]
    configs = [f"partition-id={site} num-partitions={sites}" for site in range(sites)]
    return [
        ["flower-superlink", "--insecure", *link],
        *(
            ["flower-supernode", "--insecure", *node, "--node-config", config]
            for node, config in zip(nodes, configs, strict=True)
        ),
    ]
