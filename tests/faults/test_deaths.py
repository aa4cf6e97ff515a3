"""One rank of four fails: all others exit in time, with their own code, and say which rank failed, where and why."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.conftest import FaultTimes
from tests.faulty import Fault
from tests.forked_ranks import Ended, ForkedRanks, Network
from tests.namespaces import run_as_root, two_nodes

pytestmark = pytest.mark.faults

TIMEOUT_S = 20
SLACK_S = 10  # after the timeout
SHORT_TIMEOUT_S = 6
PAIRS = ["parallel.shard_ranks=2"]
WORLD_SIZE = 4
LOST, CRASHED, FAILED, STOPPED = 3, 1, 2, 143
WHERE = {"prefill": "prefill, round 1 of 1, layer 2", "query": "query, layer 2", "decode": "decode, layer 2"}


def die(
    directory: Path,
    arguments: list[str],
    fault: Fault,
    timeout_s: int = TIMEOUT_S,
    network: Network | None = None,
) -> list[Ended]:
    options = [f"parallel.timeout_s={timeout_s}"]
    if not any(argument.startswith("hydra.run.dir=") for argument in arguments):
        options.append(f"hydra.run.dir={directory / 'run'}")
    with ForkedRanks(directory, "infer.py", [*arguments, *options], WORLD_SIZE, fault, network) as ranks:
        ended = ranks.wait(60 + timeout_s + SLACK_S)
    late = [rank for rank, end in enumerate(ended) if end.seconds > timeout_s + SLACK_S]
    assert not late, f"ranks {late} ended after {[end.seconds for end in ended]} s"
    return ended


def last_error(end: Ended) -> str:
    """Return the one error message."""
    errors = [line for line in end.stderr.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 1, end.stderr
    return errors[0]


@pytest.mark.parametrize("phase", list(WHERE))
@pytest.mark.parametrize("rank", range(WORLD_SIZE))
def test_a_killed_rank(tmp_path: Path, ask: list[str], fault_times: FaultTimes, rank: int, phase: str) -> None:
    ended = die(tmp_path, ask, Fault("kill", rank, phase, moment=str(tmp_path / "moment")))
    assert ended[rank].code == -9
    others = [other for other in range(WORLD_SIZE) if other != rank]
    assert [ended[other].code for other in others] == [LOST] * len(others)
    for other in others:
        said = last_error(ended[other])
        assert f"rank {other} cannot continue in {WHERE[phase]}. Rank {rank} " in said, said
        assert "failed first" in said and "dmesg" in said and "rerun the same command" in said
        assert "Traceback" not in ended[other].stderr
    if rank != 0:
        record = json.loads((tmp_path / "run" / "record.json").read_text())
        assert record["status"] == "failed" and f"Rank {rank} failed first" in record["error"]
    fault_times.add(
        f"rank {rank} of 4 killed at {phase}",
        [ended[other].seconds for other in others],
        timeout_s=TIMEOUT_S,
        says=last_error(ended[others[-1]]),
        codes=[ended[other].code for other in others],
    )


@pytest.mark.parametrize(("rank", "phase"), [(3, "prefill"), (1, "decode")])
def test_a_killed_rank_of_a_pipeline(
    tmp_path: Path, ask: list[str], fault_times: FaultTimes, rank: int, phase: str
) -> None:
    layer = 1 if rank < 2 else 2  # the first stage has two of three
    fault = Fault("kill", rank, phase, layer=layer, moment=str(tmp_path / "moment"))
    ended = die(tmp_path, [*ask, "parallel.stages=2"], fault)
    assert ended[rank].code == -9
    others = [other for other in range(WORLD_SIZE) if other != rank]
    assert [ended[other].code for other in others] == [LOST] * len(others)
    for other in others:
        said = last_error(ended[other])
        where = rf"({phase}, .*layer \d|query, layer \d|waiting for stage 1|between forwards)"
        assert re.search(rf"rank {other} cannot continue in {where}\. Rank {rank} ", said), said
        assert "failed first" in said and "Traceback" not in ended[other].stderr
    fault_times.add(
        f"rank {rank} of 2 stages of 2 killed at {phase}",
        [ended[other].seconds for other in others],
        timeout_s=TIMEOUT_S,
        says=last_error(ended[others[-1]]),
        codes=[ended[other].code for other in others],
    )


@pytest.mark.parametrize(
    ("phase", "options"), [*((phase, []) for phase in WHERE), ("prefill", PAIRS), ("decode", PAIRS)]
)
def test_a_killed_rank_that_has_a_part_of_the_weights(
    tmp_path: Path, ask: list[str], fault_times: FaultTimes, phase: str, options: list[str]
) -> None:
    fault = Fault("kill", 2, phase, moment=str(tmp_path / "moment"))
    ended = die(tmp_path, [*ask, "model.shard_weights=true", *options], fault)
    others = [ended[other] for other in range(WORLD_SIZE) if other != 2]
    for other in others:
        said = last_error(other)
        # Who waits for rank 2 notices at once; who waits for another one is told by that.
        assert other.code in (LOST, STOPPED), said
        assert re.search(rf"(cannot continue|was stopped) in {phase},.* layer \d[.:]", said) and "Rank 2 " in said, said
        assert "failed first" in said and "Traceback" not in other.stderr
    fault_times.add(
        f"rank 2 of 4, with a part of the weights{', two copies' if options else ''}, killed at {phase}",
        [other.seconds for other in others],
        timeout_s=TIMEOUT_S,
        says=last_error(others[-1]),
        codes=[other.code for other in others],
    )


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("kind", ["raise", "memory"])
def test_a_rank_that_raises(tmp_path: Path, ask: list[str], fault_times: FaultTimes, kind: str, rank: int) -> None:
    ended = die(tmp_path, ask, Fault(kind, rank, moment=str(tmp_path / "moment")))
    why = {"raise": "ZeroDivisionError: a compressor that divides by zero", "memory": "out of memory while prefilling"}
    own = last_error(ended[rank])
    assert ended[rank].code == (CRASHED if kind == "raise" else FAILED)
    assert f"rank {rank} failed in prefill, round 1 of 1, layer " in own and why[kind] in own
    assert ("Traceback" in ended[rank].stderr) == (kind == "raise"), "only a bug prints a traceback"
    others = [other for other in range(WORLD_SIZE) if other != rank]
    for other in others:
        said = last_error(ended[other])
        assert ended[other].code == LOST and why[kind] in said
        assert "failed first, in prefill, round 1 of 1, layer " in said and f"Rank {rank} (on " in said, said
    fault_times.add(
        f"rank {rank} of 4: {'an error in the compressor' if kind == 'raise' else 'out of memory'}",
        [ended[other].seconds for other in others],
        timeout_s=TIMEOUT_S,
        says=last_error(ended[others[-1]]),
        codes=[ended[other].code for other in others],
    )


@pytest.mark.parametrize(("kind", "rank"), [("kill", 0), ("kill", 2), ("memory", 2)])
def test_a_rank_that_fails_while_questions_decode_together(
    tmp_path: Path, checkpoint: Path, fault_times: FaultTimes, kind: str, rank: int
) -> None:
    """All others end; the same command finishes the file, with nothing answered twice."""
    text = (checkpoint / "document.txt").read_text()
    lines = [
        {"id": f"q{number}", "document": text, "query": f"What is {number}?", "max_new_tokens": 3 + 3 * number}
        for number in range(4)
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    batch = [
        *("task=batch", f"task.input={tmp_path / 'questions.jsonl'}", f"model.path={checkpoint}"),
        *("model.device=cpu", "method.hosts=4"),
    ]
    pack = Fault(kind, rank, "pack", moment=str(tmp_path / "moment"), times=6)
    ended = die(tmp_path, batch, pack)
    others = [other for other in range(WORLD_SIZE) if other != rank]
    for other in others:
        said = last_error(ended[other])
        assert ended[other].code == LOST and "in pack, layer 2" in said and f"Rank {rank} " in said, said
    fault_times.add(
        f"rank {rank} of 4 {'killed' if kind == 'kill' else 'out of memory'} while questions decode together",
        [ended[other].seconds for other in others],
        timeout_s=TIMEOUT_S,
        says=last_error(ended[others[-1]]),
        codes=[ended[other].code for other in others],
    )
    kept = (tmp_path / "questions.answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["id"] for line in kept] == ["q0"], "its answer had ended before the fault"
    options = ["parallel.timeout_s=20", f"hydra.run.dir={tmp_path / 'again'}"]
    with ForkedRanks(tmp_path, "infer.py", [*batch, *options], WORLD_SIZE) as ranks:
        again = ranks.wait(60)
    assert [end.code for end in again] == [0] * WORLD_SIZE, again[0].stderr
    answers = (tmp_path / "questions.answers.jsonl").read_text().splitlines()
    assert answers[0] == kept[0] and [json.loads(line)["id"] for line in answers] == ["q0", "q1", "q2", "q3"]


def test_a_rank_that_hangs(tmp_path: Path, ask: list[str], fault_times: FaultTimes) -> None:
    ended = die(tmp_path, ask, Fault("hang", 3, "query", moment=str(tmp_path / "moment")), SHORT_TIMEOUT_S)
    assert [end.code for end in ended] == [LOST, LOST, LOST, STOPPED]
    for end in ended[:3]:
        assert "Rank 3 (on " in last_error(end) and "was still in query, layer 2. It hangs" in last_error(end)
    assert "gave up waiting for it, in query, layer 2" in last_error(ended[3])
    fault_times.add(
        "rank 3 of 4 hangs at query",
        [end.seconds for end in ended],
        timeout_s=SHORT_TIMEOUT_S,
        says=last_error(ended[0]),
        codes=[end.code for end in ended],
    )


@pytest.mark.parametrize("method", ["apb", "ring"])
def test_a_link_that_goes_down(tmp_path: Path, ask: list[str], fault_times: FaultTimes, method: str) -> None:
    """Two ranks on each of two nodes; the second node's link goes down at its first rank's second layer."""
    method_arguments = [argument for argument in ask if not argument.startswith("method.")] + ["method=ring"]
    with two_nodes() as nodes:
        first, second = nodes.names
        network = Network(nodes.addresses[0], (first, first, second, second))
        fault = Fault("link", 2, "prefill", moment=str(tmp_path / "moment"))
        ended = die(tmp_path, ask if method == "apb" else method_arguments, fault, SHORT_TIMEOUT_S, network)
    assert [end.code for end in ended] == [LOST] * WORLD_SIZE
    where = WHERE["prefill"] if method == "apb" else "prefill, round 1 of 1, layer "
    for rank, end in enumerate(ended):
        said = last_error(end)
        assert f"rank {rank} cannot continue in {where}" in said, said
        silent = "Ranks 2, 3 failed first" if rank < 2 else f"Rank 0 (on {nodes.addresses[0]}) failed first or cannot"
        assert silent in said and "link to it is down" in said, said
        assert "terminate called" not in end.stderr and "Traceback" not in end.stderr
    fault_times.add(
        f"the link between 2 nodes x 2 ranks goes down at prefill (method={method})",
        [end.seconds for end in ended],
        timeout_s=SHORT_TIMEOUT_S,
        says=last_error(ended[0]),
        codes=[end.code for end in ended],
    )


def test_a_sweep_that_loses_a_rank_closes_with_its_table(tmp_path: Path, ask: list[str]) -> None:
    """The table has the jobs that succeeded and the one that did not."""
    sweep = ["-m", "method.compressor=window,query", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    fault = Fault("memory", 1, compressor="query", moment=str(tmp_path / "moment"))
    ended = die(tmp_path, [*ask, *sweep], fault)
    assert [end.code for end in ended] == [LOST, FAILED, LOST, LOST]
    table = ended[0].stdout[ended[0].stdout.index(" job ") :]
    rows = [line.split() for line in table.splitlines() if line.split()[:1] and line.split()[0] in "01"]
    assert [(row[1], row[-1]) for row in rows] == [("window", "ok"), ("query", "failed")], table
    assert "Job 1 (method.compressor=query) failed:" in table and "out of memory" in table


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system with room for Hydra's files but not for a record."""
    folder = tmp_path / "full"
    folder.mkdir()
    run_as_root("mount", "-t", "tmpfs", "-o", "size=64k", "none", str(folder))
    try:
        yield folder
    finally:
        run_as_root("umount", str(folder))


def test_a_full_disk_at_the_record(full_disk: Path, tmp_path: Path, ask: list[str], fault_times: FaultTimes) -> None:
    """The answer is printed, the run fails on every rank, and no partial file is left."""
    fault = Fault("fill", 0, "decode", moment=str(tmp_path / "moment"), folder=str(full_disk))
    ended = die(tmp_path, [*ask, f"hydra.run.dir={full_disk / 'run'}"], fault)
    assert [end.code for end in ended] == [FAILED] * WORLD_SIZE
    assert "Answer: " in ended[0].stdout and "Record: " not in ended[0].stdout
    said = last_error(ended[0])
    assert "record.json cannot be written (No space left on device); make room" in said
    assert sorted(path.name for path in (full_disk / "run").iterdir()) == []
    fault_times.add(
        "the disk is full at the record",
        [end.seconds for end in ended],
        timeout_s=TIMEOUT_S,
        says=said,
        codes=[end.code for end in ended],
    )
