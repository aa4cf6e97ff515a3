"""Ranks of a launch script, forked from the pool's server: real processes that may die, started within a second."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from tests import faulty
from tests.faulty import Fault
from tests.pool import PRELOADED, workers_environment

CLONE_NEWNET = 0x40000000
AFTER_RESULT_S = 0.4
LAUNCHER = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "TORCHELASTIC_RUN_ID", faulty.VARIABLE)


@dataclass(frozen=True)
class Ended:
    """How a rank ended.

    Attributes
    ----------
    code : exit code, negative for a signal
    seconds : from the fault until it ended; from the start if there was no fault
    """

    code: int
    stdout: str
    stderr: str
    seconds: float


@dataclass(frozen=True)
class Network:
    """Where ranks meet.

    Attributes
    ----------
    namespaces : one per rank; empty for this process's namespace
    """

    master: str = "127.0.0.1"
    namespaces: tuple[str, ...] = ()


class ForkedRanks:
    """Ranks of ``launch/<script>`` with these arguments, started on entry and killed on exit at the latest."""

    def __init__(
        self,
        directory: Path,
        script: str,
        arguments: Sequence[str],
        world_size: int,
        fault: Fault | None = None,
        network: Network | None = None,
        journal: str = "",
    ) -> None:
        self.directory = directory
        self.fault = fault
        self._arguments = (script, list(arguments), world_size, fault, network or Network(), journal, _free_port())
        self._world_size = world_size
        self.processes: list[Any] = []
        self.began = 0.0

    def __enter__(self) -> ForkedRanks:
        self.directory.mkdir(parents=True, exist_ok=True)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self.began = time.time()
        with workers_environment():
            for rank in range(self._world_size):
                process = context.Process(target=_serve, args=(rank, str(self.directory), *self._arguments))
                process.start()
                self.processes.append(process)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def kill(self, ranks: Sequence[int]) -> None:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.processes[rank].pid, signal.SIGKILL)

    def wait(self, timeout_s: float) -> list[Ended]:
        """Wait for all ranks and return how they ended; fail the test if one does not end in time."""
        deadline = time.time() + timeout_s
        ends: dict[int, float] = {}
        while len(ends) < len(self.processes) and time.time() < deadline:
            for rank, process in enumerate(self.processes):
                if rank not in ends and process.exitcode is not None:
                    ends[rank] = time.time()
            time.sleep(0.02)
        missing = [rank for rank in range(len(self.processes)) if rank not in ends]
        if missing:
            output = "\n".join(f"--- rank {rank}\n{self._output(rank, 'err')}" for rank in range(len(self.processes)))
            raise AssertionError(f"ranks {missing} did not end in {timeout_s} s\n{output}")
        began = self.began
        if self.fault is not None and self.fault.moment:
            moment = Path(self.fault.moment)
            assert moment.exists(), f"there was no fault: {self._output(0, 'err')}"
            began = float(moment.read_text())
        return [
            Ended(process.exitcode, self._output(rank, "out"), self._output(rank, "err"), ends[rank] - began)
            for rank, process in enumerate(self.processes)
        ]

    def _output(self, rank: int, kind: str) -> str:
        path = self.directory / f"rank{rank}.{kind}"
        return path.read_text(errors="replace") if path.exists() else ""


def _serve(
    rank: int,
    directory: str,
    script: str,
    arguments: list[str],
    world_size: int,
    fault: Fault | None,
    network: Network,
    journal: str,
    port: int,
) -> None:
    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{directory}/rank{rank}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (
        os.fdopen(os.dup(number), "w", encoding="utf-8", errors="backslashreplace") for number in (1, 2)
    )
    for name in LAUNCHER:
        os.environ.pop(name, None)
    launcher = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in launcher.items()} if world_size > 1 else {})
    os.environ.update({"MASTER_ADDR": network.master, "HF_HUB_OFFLINE": "1", "TORCH_CPP_LOG_LEVEL": "ERROR"})
    if network.namespaces:
        os.environ.pop("GLOO_SOCKET_IFNAME", None)
        _enter_namespace(network.namespaces[rank])
    if fault is not None:
        os.environ.update(fault.as_variable())
    if journal:
        _keep_journal(Path(journal))
    try:
        faulty.run_script(script, arguments)
    finally:
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()


def _keep_journal(path: Path) -> None:
    """After each result is on the disk, write its id to a journal, then leave time for kills."""
    from apb_ds.report.answers import AnswerFile

    append = AnswerFile.append

    def append_and_note(self: Any, index: int, result: dict[str, Any]) -> None:
        append(self, index, result)
        with path.open("a") as stream:
            stream.write(f"{index}\n")
        time.sleep(AFTER_RESULT_S)  # so that a killed run has some results but not all, on a fast machine too

    mock.patch.object(AnswerFile, "append", append_and_note).start()


def _enter_namespace(name: str) -> None:
    handle = os.open(f"/run/netns/{name}", os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(handle, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"the network namespace {name} cannot be entered")
    os.close(handle)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
