"""Running launch/infer.py inside a process of the pool: command line in, exit code and what was said out."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
INTERRUPTED = 130


@dataclass(frozen=True)
class Ended:
    """How one rank's run ended.

    Attributes
    ----------
    errors : why each job failed, None for one that did not; empty if there was no job
    seconds : from the command line to the exit code, libraries imported before
    """

    code: int
    stdout: str
    stderr: str
    errors: list[str | None]
    records: list[dict[str, Any]]
    seconds: float


def run_infer(
    rank: int,
    world_size: int,
    arguments: list[str],
    stdin: str | bytes = "",
    patches: tuple[str, ...] = (),
    config: str = "infer",
) -> Ended:
    """Run launch/infer.py with these arguments as one rank of the group that exists, if there are several.

    Parameters
    ----------
    patches : names in `PATCHES`, what is made to go wrong
    config : ``eval`` for launch/eval.py
    """
    infer, common = _launch_modules()
    from apb_ds.parallel.groups import SequenceGroup
    from apb_ds.session import Session

    out, err = io.StringIO(), io.StringIO()
    content = stdin.encode() if isinstance(stdin, str) else stdin
    with contextlib.ExitStack() as stack:
        stack.enter_context(_as_rank(rank, world_size))
        stack.enter_context(mock.patch.object(common, "FIRST_RANK_GRACE_S", 0))
        stack.enter_context(mock.patch.object(common.ending.Watch, "leave", _leave))
        stack.enter_context(mock.patch.object(sys, "argv", ["infer.py", *arguments]))
        stack.enter_context(mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(content))))
        for name in patches:
            stack.enter_context(PATCHES[name](rank))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        group = (
            SequenceGroup()
            if world_size == 1
            else SequenceGroup.of(importlib.import_module("torch").distributed.group.WORLD)
        )
        session = Session(group)
        inference = infer.Inference(session)
        inference.watch.follow(group)
        began = time.perf_counter()
        try:
            code = common.run_hydra(config, inference)
        except SystemExit as end:
            code = end.code
        except KeyboardInterrupt:
            code = INTERRUPTED
        seconds = time.perf_counter() - began
    records = session.records
    return Ended(code, out.getvalue(), err.getvalue(), [record["error"] for record in records], records, seconds)


def _launch_modules() -> tuple[Any, Any]:
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    return importlib.import_module("launch.infer"), importlib.import_module("launch.common")


@contextlib.contextmanager
def _as_rank(rank: int, world_size: int) -> Iterator[None]:
    """Set what a launcher sets; put streams, logging and signals that the script changes back."""
    import logging
    import signal
    import weakref

    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    values = {name: str(value) for name, value in place.items()} if world_size > 1 else {}
    level, handlers = logging.getLogger().level, list(logging.getLogger().handlers)
    stdout, stderr, handler = sys.stdout, sys.stderr, signal.getsignal(signal.SIGTERM)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, {**values, "HF_HUB_OFFLINE": "1"}))
        # Hydra closes all handlers that there are, and absl's (ROUGE brings it along) then closes its stream: pytest's.
        stack.enter_context(mock.patch.object(logging, "_handlerList", []))
        stack.enter_context(mock.patch.object(logging, "_handlers", weakref.WeakValueDictionary()))
        try:
            yield
        finally:
            sys.stdout, sys.stderr = stdout, stderr
            signal.signal(signal.SIGTERM, handler)
            logging.getLogger().setLevel(level)
            logging.getLogger().handlers[:] = handlers


def _leave(_: Any, code: int) -> None:
    """End the run, not the process, which belongs to the pool."""
    raise SystemExit(code)


def _no_memory(*_: Any, **__: Any) -> None:
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def _not_here(*_: Any, **__: Any) -> None:
    raise AssertionError("text is for the first rank alone")


@contextlib.contextmanager
def _no_text(rank: int) -> Iterator[None]:
    """Have every rank but the first fail when it reads a text or tokenises one."""
    from transformers import PreTrainedTokenizerFast

    with contextlib.ExitStack() as stack:
        if rank > 0:
            stack.enter_context(mock.patch.object(PreTrainedTokenizerFast, "__call__", _not_here))
            for reader in ("apb_ds.tasks.prompt.read_text", "apb_ds.session.chat.read_text"):
                stack.enter_context(mock.patch(reader, _not_here))
        yield


@contextlib.contextmanager
def _interrupt(rank: int) -> Iterator[None]:
    """Interrupt every rank of a batch or an evaluation when its third answer has ended, which is not written then."""
    from apb_ds.session.batch import Batch
    from apb_ds.session.evaluation import Evaluation

    taken = 0

    def two_of(take: Any) -> Any:
        def take_two(self: Any, ended: Any) -> None:
            nonlocal taken
            taken += 1
            if taken == 3:
                raise KeyboardInterrupt
            take(self, ended)

        return take_two

    with (
        mock.patch.object(Batch, "_take", two_of(Batch._take)),
        mock.patch.object(Evaluation, "_take", two_of(Evaluation._take)),
    ):
        yield


class _Slow(io.StringIO):
    """Standard input whose lines take their time."""

    def __next__(self) -> str:
        time.sleep(0.5)
        return super().__next__()


@contextlib.contextmanager
def _slow_questions(rank: int) -> Iterator[None]:
    """Have questions come slowly, while ranks wait for a tenth of a second at a time."""
    questions = sys.stdin.read()
    with mock.patch.object(sys, "stdin", _Slow(questions)), mock.patch("apb_ds.session.chat.MAX_WAIT_S", 0.1):
        yield


@contextlib.contextmanager
def _optimizer(rank: int) -> Iterator[None]:
    """Have a sweeper ask for one job at a time, keep what each returned, and write its own file at the end."""
    from hydra.core.plugins import Plugins

    Plugins.instance()
    module = importlib.import_module("hydra_plugins.apb_ds_sweep")

    def sweep(self: Any, arguments: list[str]) -> None:
        returned = []
        for number, hosts in enumerate((2, 4)):
            (job,) = self.launcher.launch([[*arguments, f"method.hosts={hosts}"]], initial_job_idx=number)
            returned.append(job.return_value)
        (Path(self.config.hydra.sweep.dir) / "returned").write_text(str(returned))
        print(f"returned on rank {rank}: {returned}", file=sys.stderr)

    with mock.patch.object(module.OneByOneSweeper, "sweep", sweep):
        yield


@contextlib.contextmanager
def _ctrl_c(times: int, rank: int) -> Iterator[None]:
    """Press Ctrl-C so many times when a run's third token is chosen, on every rank, as a terminal does."""
    import signal

    from apb_ds.engine.decoding import LockstepDecoder

    choose, chosen = LockstepDecoder._choose, 0

    def choose_three(self: Any, *arguments: Any) -> Any:
        nonlocal chosen
        chosen += 1
        for _ in range(times if chosen == 3 else 0):
            signal.raise_signal(signal.SIGINT)
        return choose(self, *arguments)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a pool's processes ignore it
    try:
        with mock.patch.object(LockstepDecoder, "_choose", choose_three):
            yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _ctrl_c_at_the_prompt(rank: int) -> Iterator[None]:
    """Press Ctrl-C while the second question is awaited."""
    from apb_ds.session.chat import QuestionLines

    following, asked = QuestionLines.next, 0

    def next_one(self: Any) -> Any:
        nonlocal asked
        asked += 1
        if asked == 2:
            raise KeyboardInterrupt
        return following(self)

    with mock.patch.object(QuestionLines, "next", next_one):
        yield


PATCHES: dict[str, Any] = {
    "an optimizing sweeper": _optimizer,
    "no memory for a round": lambda rank: mock.patch("apb_ds.engine.prefill.run_round", _no_memory),
    "text on the first rank only": _no_text,
    "interrupted at the third line": _interrupt,
    "slow questions": _slow_questions,
    "Ctrl-C during an answer": functools.partial(_ctrl_c, 1),
    "Ctrl-C twice": functools.partial(_ctrl_c, 2),
    "Ctrl-C at the prompt": _ctrl_c_at_the_prompt,
}
