"""A server as a user starts it: a process of its own, with or without the deepspeed launcher."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.launching import deepspeed_command

ROOT = Path(__file__).resolve().parents[1]
START_S = 120.0
END_S = 30.0
LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass
class ServerProcess:
    """A running server.

    Attributes
    ----------
    process : the script's, or the launcher's
    family : it and all that it has started, the ranks in order among them
    """

    address: str
    process: subprocess.Popen[bytes]
    output: int
    family: list[psutil.Process]

    @property
    def said(self) -> str:
        """What it has printed."""
        return os.pread(self.output, 2**22, 0).decode(errors="replace")

    def ranks(self) -> list[psutil.Process]:
        """Return the processes of its ranks, in order."""
        found = [one for one in self.family if _is_rank(one)]
        return sorted(found, key=lambda one: int(one.environ().get("RANK", "0")))

    def wait(self) -> int:
        """Wait until all of its processes have ended; return the exit status."""
        status = self.process.wait(END_S)
        _, left = psutil.wait_procs(self.family, END_S)
        assert not left, f"processes are left behind: {left}"
        return status


def _is_rank(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        command = process.cmdline()
        return any(word.endswith("launch/serve.py") for word in command[:4]) and "launch.py" not in " ".join(
            command[:4]
        )
    return False


@contextlib.contextmanager
def running_server(*overrides: str, num_ranks: int = 1) -> Iterator[ServerProcess]:
    """Start `launch/serve.py` on the CPU and a free port; end it."""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    launcher = [sys.executable] if num_ranks == 1 else deepspeed_command(num_ranks)
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [*launcher, "launch/serve.py", "serve.port=0", "model.device=cpu", f"hydra.run.dir={folder}", *overrides],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            address = _address(process, output.fileno())
            started = psutil.Process(process.pid)
            family = [started, *started.children(recursive=True)]
            yield ServerProcess(address, process, output.fileno(), family)
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise


@contextlib.contextmanager
def server_process(*overrides: str) -> Iterator[str]:
    """Start a server on one rank; yield its address, and end it."""
    with running_server(*overrides) as server:
        yield server.address


def _address(process: subprocess.Popen[bytes], output: int) -> str:
    """Wait until a server listens; return its address."""
    deadline = time.monotonic() + START_S
    while True:
        said = os.pread(output, 2**20, 0).decode()
        found = re.search(r"Serving .* at (http://\S+),", said)
        if found:
            return found[1]
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the server did not start (exit status {process.poll()}):\n{said}")
        time.sleep(0.1)
