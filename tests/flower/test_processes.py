"""A federation of real processes, a SuperLink and three SuperNodes, one of whose clients is killed while it trains."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.processes import until

pytest.importorskip("flwr", reason="Flower is not installed; the extra flower has it: nox -s federation")

pytestmark = pytest.mark.skipif(
    "BECAME_FEDERATION" not in os.environ, reason="it takes a minute, and nox -s federation asks for it"
)
ROOT = Path(__file__).parents[2]
PROJECT = """
[project]
name = "federation"
version = "1.0.0"
description = "Of a test."
license = "MIT"
dependencies = []

[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[tool.flwr.app]
publisher = "became"

[tool.flwr.app.components]
serverapp = "app:server"
clientapp = "app:client"

[tool.flwr.app.config]
folder = "."
"""
APP = """
import os
import time
from pathlib import Path

import numpy as np
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from adapters.flower import MergeStrategy, answer, record_of, weights_of
from became_core import FisherMerge

client = ClientApp()
server = ServerApp()


@client.train()
def train(message, context):
    part = int(context.node_config["partition-id"])
    weights = {"w": (0.5 * weights_of(message)["w"] + part / 3).astype(np.float32)}
    if part == 1:
        Path(context.run_config["folder"], "process").write_text(str(os.getpid()))
        time.sleep(600)
    return answer(message, weights, {"w": np.full(4, 1 / (1 + part), np.float32)}, 10 + part)


@server.main()
def main(grid, context):
    strategy = MergeStrategy(FisherMerge(), fraction_evaluate=0.0, min_available_nodes=3)
    result = strategy.start(grid, record_of({"w": np.zeros(4, np.float32)}), num_rounds=1, timeout=30)
    weights = result.arrays["w"].numpy().tolist()
    Path(context.run_config["folder"], "result").write_text(f"{weights[0]:.6f} {strategy.left_out[1]}")
"""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def superlink(tmp_path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """The address of a SuperLink with three SuperNodes, and the environment of whoever uses it."""
    home = tmp_path / "home"
    environment = {**os.environ, "FLWR_HOME": str(home), "PYTHONPATH": str(ROOT)}
    programs = Path(sys.executable).parent
    environment["PATH"] = f"{programs}{os.pathsep}{environment.get('PATH', '')}"
    home.mkdir()
    address = f"127.0.0.1:{free_port()}"

    def start(program: str, port: str, *words: str) -> subprocess.Popen[bytes]:
        arguments = [str(programs / program), "--insecure", "--host", "127.0.0.1", "--port", port, *words]
        log = (tmp_path / f"{program}-{port}.log").open("wb")
        with log:
            return subprocess.Popen(arguments, stdout=log, stderr=log, env=environment, start_new_session=True)

    def end(process: subprocess.Popen[bytes]) -> None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def answers() -> bool:
        host, port = address.split(":")
        with socket.socket() as probe:
            return probe.connect_ex((host, int(port))) == 0

    with ExitStack() as processes:
        processes.callback(end, start("flower-superlink", address.rpartition(":")[2]))
        until(answers)
        for part in range(3):
            config = ("--superlink", address, "--node-config", f"partition-id={part} num-partitions=3")
            processes.callback(end, start("flower-supernode", str(free_port()), *config))
        yield address, environment


@pytest.mark.timeout(600)
def test_a_killed_client_is_left_out_of_a_federation_of_processes(
    superlink: tuple[str, dict[str, str]], tmp_path: Path
) -> None:
    address, environment = superlink
    app = tmp_path / "app"
    app.mkdir()
    (app / "pyproject.toml").write_text(PROJECT)
    (app / "app.py").write_text(APP)
    (tmp_path / "home" / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{address}"\ninsecure = true\n'
    )
    words = ["flwr", "run", str(app), "here", "--run-config", f"folder='{tmp_path}'"]
    words[0] = str(Path(sys.executable).parent / "flwr")
    subprocess.run(words, check=True, env=environment, timeout=120)
    until(lambda: (tmp_path / "process").exists() and (tmp_path / "process").read_text())
    os.kill(int((tmp_path / "process").read_text()), signal.SIGKILL)
    until(lambda: (tmp_path / "result").exists() and (tmp_path / "result").read_text())
    told = (tmp_path / "result").read_text()
    # Parts 0 and 2, by information times samples: 10 and 12 / 3.
    expected = (12 / 3) * (2 / 3) / (10 + 12 / 3)
    assert re.fullmatch(rf"{expected:.6f} \['node \d+ is left out: it has not answered\.'\]", told)
