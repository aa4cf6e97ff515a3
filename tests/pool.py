"""Processes that the test session starts once and reuses, over gloo on CPU or over NCCL with one GPU each.

Gloo processes fork from a server that has already imported torch, transformers and deepspeed, so a new pool takes a
fraction of a second; gloo itself starts after the fork. They meet through a file and use only the loopback device.
NCCL processes are spawned, since CUDA does not survive a fork.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

PRELOADED = ["tests.preloaded"]
START_TIMEOUT_S = 120
# After one rank fails, the others probably hang in a collective: how long they may take to report as well.
GRACE_S = 3.0


class RankError(AssertionError):
    """One or more ranks raised; the message has their tracebacks."""


class RankTimeout(AssertionError):
    """One or more ranks did not answer in time; the message has their stacks."""


GLOO, NCCL = "gloo", "nccl"
ENVIRONMENTS = {
    GLOO: {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"},
    NCCL: {"DS_ACCELERATOR": "cuda", "NCCL_SOCKET_IFNAME": "lo"},
}


@contextlib.contextmanager
def workers_environment(backend: str = GLOO) -> Any:
    """Set the environment that the workers or their server start with, then restore it: the session may use a GPU."""
    values = {
        **ENVIRONMENTS[backend],
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }  # like launch/*.py
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    before = {name: os.environ.get(name) for name in (*values, *launcher)}
    for name in launcher:
        os.environ.pop(name, None)
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def _join_group(rank: int, world_size: int, directory: str, backend: str, shard_weights: bool) -> None:
    import torch

    torch.set_num_threads(1)
    if backend == NCCL:
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        backend, init_method=f"file://{directory}/rendezvous", rank=rank, world_size=world_size
    )
    importlib.import_module("apb_ds.parallel.groups").deepspeed_comm_ready()
    if shard_weights and world_size > 1:
        importlib.import_module("tests.sharding").shard_by_default()


def _serve(connection: Connection, rank: int, world_size: int, directory: str) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    log = os.open(f"{directory}/rank{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.register(signal.SIGUSR1, file=log)
    reply: tuple[str, Any]
    while True:
        try:
            message = connection.recv_bytes()
        except (EOFError, ConnectionResetError):
            return
        try:
            path, request = pickle.loads(message)
            sys.path[:] = path
            function, args = pickle.loads(request)
            reply = ("result", function(rank, world_size, *args))
            answer = pickle.dumps(reply)
        except BaseException:
            answer = pickle.dumps(("error", traceback.format_exc()))
        connection.send_bytes(answer)


class Pool:
    """`world_size` ranks with torch.distributed and deepspeed.comm initialised; the first `run` starts them.

    Parameters
    ----------
    shard_weights : whether engines shard their models' weights where they are not told
    """

    def __init__(self, world_size: int, backend: str = GLOO, shard_weights: bool = False):
        self.world_size = world_size
        self.backend = backend
        self._shard_weights = shard_weights
        self._workers: list[tuple[Any, Connection]] = []
        self._directory = ""

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
        """Call ``function(rank, world_size, *args)`` on every rank and return the results in rank order.

        Parameters
        ----------
        function : importable by name (not a closure), with picklable results
        timeout : float, seconds until the ranks are killed

        Raises
        ------
        RankError
            With the remote tracebacks. The next `run` starts new ranks.
        RankTimeout
            With the stacks of the ranks that did not answer. The next `run` starts new ranks.
        """
        if not self._workers:
            self._start()
        try:
            return self._call(function, args, timeout)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Kill the ranks; `run` starts new ones."""
        for process, connection in self._workers:
            connection.close()
            process.kill()
        for process, _ in self._workers:
            process.join()
        self._workers = []
        if self._directory:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = ""

    def _start(self) -> None:
        self._directory = tempfile.mkdtemp(prefix="apb_pool_")
        context: Any = multiprocessing.get_context("forkserver" if self.backend == GLOO else "spawn")
        if self.backend == GLOO:
            context.set_forkserver_preload(PRELOADED)
        with workers_environment(self.backend):
            for rank in range(self.world_size):
                here, there = context.Pipe()
                process = context.Process(
                    target=_serve, args=(there, rank, self.world_size, self._directory), daemon=True
                )
                process.start()
                there.close()
                self._workers.append((process, here))
        try:
            self._call(_join_group, (self._directory, self.backend, self._shard_weights), START_TIMEOUT_S)
        except BaseException:
            self.close()
            raise

    def _call(self, function: Callable[..., Any], args: tuple[Any, ...], timeout: float) -> list[Any]:
        message = pickle.dumps((sys.path, pickle.dumps((function, args))))
        for _, connection in self._workers:
            connection.send_bytes(message)
        results: dict[int, Any] = {}
        errors: dict[int, str] = {}
        deadline = time.monotonic() + timeout
        while len(results) + len(errors) < self.world_size:
            waiting = {
                connection: rank
                for rank, (_, connection) in enumerate(self._workers)
                if rank not in results and rank not in errors
            }
            for ready in wait(list(waiting), timeout=max(0.0, deadline - time.monotonic())):
                rank = waiting[ready]  # type: ignore[index]
                kind, value = self._receive(rank)
                (results if kind == "result" else errors)[rank] = value
                if kind == "error":
                    deadline = min(deadline, time.monotonic() + GRACE_S)
            if time.monotonic() >= deadline:
                break
        silent = [rank for rank in range(self.world_size) if rank not in results and rank not in errors]
        if errors:
            also = f"\nRanks {silent} then gave no answer." if silent else ""
            raise RankError("".join(f"\n--- rank {rank} ---\n{errors[rank]}" for rank in sorted(errors)) + also)
        if silent:
            raise RankTimeout(f"ranks {silent} gave no answer in {timeout} s{self._stacks(silent)}")
        return [results[rank] for rank in range(self.world_size)]

    def _receive(self, rank: int) -> tuple[str, Any]:
        process, connection = self._workers[rank]
        try:
            return pickle.loads(connection.recv_bytes())
        except (EOFError, ConnectionResetError):
            process.join(1)
            return "error", f"the process died, exit code {process.exitcode}{self._log(rank)}"

    def _stacks(self, ranks: list[int]) -> str:
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._workers[rank][0].pid, signal.SIGUSR1)
        time.sleep(0.3)
        return "".join(self._log(rank) for rank in ranks)

    def _log(self, rank: int) -> str:
        path = Path(self._directory) / f"rank{rank}.log"
        text = path.read_text(errors="replace")[-4000:] if path.exists() else ""
        return f"\n--- output of rank {rank} ---\n{text}"


class Pools:
    """The session's pools by world size: ``pools(2).run(function, ...)``."""

    def __init__(self, shard_weights: bool = False) -> None:
        self._pools: dict[int, Pool] = {}
        self._shard_weights = shard_weights

    def __call__(self, world_size: int) -> Pool:
        return self._pools.setdefault(world_size, Pool(world_size, shard_weights=self._shard_weights))

    def close(self) -> None:
        for pool in self._pools.values():
            pool.close()
