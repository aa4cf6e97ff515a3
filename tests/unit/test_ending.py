"""How a launcher's rank exits: on a signal that its main thread cannot handle, and when the launcher has exited."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
END_S = 30
ARRIVES_S = 0.5  # between its "ready" and its wait
LAUNCHER = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
RANK = LAUNCHER | {"PYTHONPATH": str(ROOT)}
# Locking a mutex twice blocks the main thread in C, where Python runs no signal handlers, as a collective does.
WAITS = {
    "in Python": "import time\nwhile True: time.sleep(0.01)",
    "in C": ("for _ in range(2): library.pthread_mutex_lock(mutex)"),
}
SCRIPT = """
import ctypes
from apb_ds.parallel.failure import ending
library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(128)
ending.MAIN_THREAD_S = 1.0
watch = ending.Watch()
kept = []
with watch:
    print("ready", flush=True)
    try:
        {wait}
    except ending.Stopped as error:
        watch.give_up(error, lambda why: print("kept", why, flush=True))
"""


def script(wait: str) -> list[str]:
    return [sys.executable, "-c", SCRIPT.format(wait=WAITS[wait].replace("\n", "\n        "))]


def start(command: list[str], **environment: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        command, env=os.environ | RANK | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("wait", list(WAITS))
def test_sigterm(wait: str) -> None:
    process = start(script(wait))
    time.sleep(ARRIVES_S)
    process.terminate()
    stdout, stderr = process.communicate(timeout=END_S)
    assert process.returncode == 143, stderr
    assert stderr.count("Error: ") == 1 and "it got SIGTERM" in stderr and "Traceback" not in stderr
    if wait == "in Python":
        assert stdout.startswith("kept it got SIGTERM"), "the main thread exits by itself"


@pytest.mark.parametrize("wait", list(WAITS))
def test_a_launcher_that_was_killed(wait: str, tmp_path: Path) -> None:
    """Each of its orphans notices."""
    said = tmp_path / "said"
    launcher = (
        "import subprocess, sys, time\n"
        f"said = open({str(said)!r}, 'w')\n"
        f"rank = subprocess.Popen({script(wait)!r}, stdout=subprocess.PIPE, stderr=said, text=True)\n"
        "rank.stdout.readline()\n"
        "print('ready', flush=True)\n"
        "print(rank.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    process = start([sys.executable, "-c", launcher])
    assert process.stdout is not None
    rank = int(process.stdout.readline())
    process.kill()
    process.communicate()
    deadline = time.monotonic() + END_S
    while Path(f"/proc/{rank}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    if Path(f"/proc/{rank}").exists():
        os.kill(rank, signal.SIGKILL)
        pytest.fail("the rank is still alive")
    assert f"its launcher (process {process.pid}) has exited" in said.read_text()


def test_a_rank_ends_with_those_of_the_group_that_its_watch_follows() -> None:
    code = (
        "import time, types, torch\nfrom apb_ds.parallel.failure import ending\n"
        "from apb_ds.parallel.failure.board import Board\nfrom apb_ds.parallel.failure.progress import Progress\n"
        "from apb_ds.parallel.failure.reports import Kind\n"
        "ending.MAIN_THREAD_S = 0.5\nstore, progress = torch.distributed.HashStore(), Progress()\n"
        "progress.enter_layer('decode', 6)\n"
        "with ending.Watch() as watch:\n"
        "    watch.follow(types.SimpleNamespace(board=Board(store, 1, 2, progress)))\n"
        "    print('ready', flush=True)\n"
        "    Board(store, 0, 2, Progress()).post(Kind.RAISED, 'boom')\n"
        "    time.sleep(60)\n"
    )
    process = start([sys.executable, "-c", code])
    _, stderr = process.communicate(timeout=END_S)
    assert process.returncode == 143 and stderr.count("Error: ") == 1, stderr
    assert "rank 1 was stopped in decode, layer 7: another rank has failed. Rank 0 (on " in stderr
    assert "failed first, in start: boom." in stderr


def test_without_a_launcher_nothing_is_watched() -> None:
    code = (
        "import signal, threading\nfrom apb_ds.parallel.failure import ending\n"
        "with ending.Watch():\n"
        "    print('ready', threading.active_count(), signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | RANK | {"WORLD_SIZE": "1"},
        capture_output=True,
        text=True,
        timeout=END_S,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "ready 1 True\n"), done.stderr


def test_signals_are_as_before_afterwards() -> None:
    code = (
        "import signal\nfrom apb_ds.parallel.failure import ending\n"
        "with ending.Watch():\n"
        "    inside = signal.getsignal(signal.SIGTERM)\n"
        "print('ready', inside == signal.SIG_DFL, signal.getsignal(signal.SIGTERM) == signal.SIG_DFL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | RANK, capture_output=True, text=True, timeout=END_S, check=False
    )
    assert done.stdout == "ready False True\n", done.stderr


def test_no_thread_is_left_in_the_store_when_the_interpreter_goes() -> None:
    code = (
        "import time, types, torch\nfrom apb_ds.parallel.failure import ending\n"
        "ending.POLL_S = 0.01\nstore = torch.distributed.TCPStore('127.0.0.1', 0, 1, True, wait_for_workers=False)\n"
        "def has_reports():\n"
        "    until = time.monotonic() + 2\n"
        "    while time.monotonic() < until:\n"
        "        store.check(['any'])\n"
        "    return False\n"
        "with ending.Watch() as watch:\n"
        "    watch.follow(types.SimpleNamespace(board=types.SimpleNamespace(has_reports=has_reports)))\n"
        "    time.sleep(0.5)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | RANK, capture_output=True, text=True, timeout=END_S, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_closed_pipe_is_no_traceback() -> None:
    code = (
        "from apb_ds.parallel.failure import ending\n"
        "print('ready', flush=True)\n"
        "with ending.Watch() as watch:\n"
        "    try:\n"
        "        while True: print('words', flush=True)\n"
        "    except BrokenPipeError as error:\n"
        "        watch.give_up(error)\n"
    )
    for world_size in ("1", "2"):
        process = start([sys.executable, "-c", code], WORLD_SIZE=world_size)
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        said = process.stderr.read()
        assert process.wait(END_S) == 141
        assert said.count("\n") == 1 and "Error: " in said and "closed pipe" in said and "Traceback" not in said
