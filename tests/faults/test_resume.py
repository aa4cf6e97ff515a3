"""Jobs with many questions are killed at random moments, again and again: no answer is lost or computed twice."""

from __future__ import annotations

import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.faults.conftest import FaultTimes
from tests.forked_ranks import ForkedRanks

pytestmark = pytest.mark.faults

NUM_KILLS = 20
NUM_QUESTIONS = 120  # more than can be answered between the kills
NUM_SAMPLES = 120
SEQUENCES = 2  # that are answered, and so written, at a time
WORLD_SIZE = 2
END_S = 120
START_S = 2.5  # a little longer than the ranks take until the first answer
TIMINGS = ("query_s", "decode_s", "prefill_s", "seconds")


@dataclass(frozen=True)
class Work:
    """A job that can be resumed.

    Attributes
    ----------
    outputs : its result files
    journal : gets a line for each answer that is on the disk
    """

    script: str
    arguments: list[str]
    outputs: list[Path]
    journal: Path
    num_questions: int


def batch_work(directory: Path, checkpoint: Path) -> Work:
    document = (checkpoint / "document.txt").read_text()
    lines = [
        {"id": f"q{number}", "document": document[: 300 + 40 * (number // 4)], "query": f"What is {number}?"}
        for number in range(NUM_QUESTIONS)
    ]
    directory.mkdir(parents=True)
    (directory / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = [f"task.input={directory / 'questions.jsonl'}", "task=batch", "task.max_new_tokens=6"]
    arguments.append(f"task.sequences={SEQUENCES}")
    outputs = [directory / "questions.answers.jsonl", directory / "questions.answers.jsonl.settings.json"]
    return Work("infer.py", arguments, outputs, directory / "journal", NUM_QUESTIONS)


def evaluation_work(directory: Path, checkpoint: Path) -> Work:
    directory.mkdir(parents=True)
    arguments = [
        *("task=passkey_grid", "task.num_tokens=[800,1200]", "task.depth=[0.1,0.5,0.9]", "task.max_new_tokens=6"),
        *(f"task.num_samples={NUM_SAMPLES // 6}", f"eval.output={directory / 'results'}"),
        f"eval.sequences={SEQUENCES}",
    ]
    return Work(
        "eval.py",
        arguments,
        [directory / "results" / "samples.jsonl", directory / "results" / "summary.json"],
        directory / "journal",
        NUM_SAMPLES,
    )


WORKS = {"task=batch": batch_work, "launch/eval.py": evaluation_work}


def start(work: Work, checkpoint: Path, directory: Path) -> ForkedRanks:
    common = [f"model.path={checkpoint}", "model.device=cpu", "method.hosts=2", "parallel.timeout_s=20"]
    arguments = [*work.arguments, *common, f"hydra.run.dir={directory / 'run'}"]
    return ForkedRanks(directory, work.script, arguments, WORLD_SIZE, journal=str(work.journal))


def without_timings(path: Path) -> list[str]:
    """Return the lines of a result file with all times set to zero, and a summary without its usage."""
    if path.suffix == ".json":
        content = json.loads(path.read_text())
        if path.name != "summary.json":
            return [json.dumps(content)]
        kept = {name: content[name] for name in ("task", "settings", "all", "cells")}
        return [json.dumps(_untimed(kept))]
    return [json.dumps(_untimed(json.loads(line))) for line in path.read_text().splitlines()]


def _untimed(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: 0 if name in TIMINGS or name.endswith("_s") else _untimed(item) for name, item in value.items()}
    return [_untimed(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("name", list(WORKS))
def test_killed_twenty_times(tmp_path: Path, checkpoint: Path, fault_times: FaultTimes, name: str) -> None:
    """Kill one rank or both at random moments; each run resumes where the last one stopped."""
    make = WORKS[name]
    undisturbed = make(tmp_path / "undisturbed", checkpoint)
    with start(undisturbed, checkpoint, tmp_path / "ranks") as ranks:
        ended = ranks.wait(END_S)
    assert [end.code for end in ended] == [0] * WORLD_SIZE, ended[0].stderr
    draw = random.Random(0)
    work = make(tmp_path / "killed", checkpoint)
    seen, kills = 0, 0
    while kills < NUM_KILLS:
        with start(work, checkpoint, tmp_path / "ranks") as ranks:
            if kills % 2:  # at any moment, perhaps before they have met: all at once, as a launcher does
                time.sleep(draw.random() * START_S)
                victims = [0, 1]
            else:
                _wait_for_more(work, ranks, seen + draw.randrange(1, 3), draw.random() * 0.2)
                victims = draw.choice([[0], [1], [0, 1]])
            if all(process.exitcode == 0 for process in ranks.processes):
                break
            ranks.kill(victims)
            kills += 1
            ended = ranks.wait(END_S)
        assert all(end.code != 0 for end in ended), [end.stderr for end in ended]
        assert [ended[rank].code for rank in victims] == [-9] * len(victims)
        for path in work.outputs:
            assert not path.exists() or path.read_bytes().endswith(b"\n"), "a partial line"
        now = _answered(work)
        assert now >= seen, "an answer was lost"
        seen = now
    assert kills == NUM_KILLS, f"{work.num_questions} questions were answered after {kills} kills"
    with start(work, checkpoint, tmp_path / "ranks") as ranks:
        ended = ranks.wait(END_S)
    assert [end.code for end in ended] == [0] * WORLD_SIZE, ended[0].stderr
    for old, new in zip(undisturbed.outputs, work.outputs, strict=True):
        assert without_timings(new) == [
            line.replace(str(old.parents[-2]), str(new.parents[-2])) for line in without_timings(old)
        ]
    journal = work.journal.read_text().splitlines()
    assert len(journal) == len(set(journal)), "a question was answered twice"
    assert len(journal) >= work.num_questions - kills, "a kill may come between an answer and its line in the journal"
    left = [path.name for path in work.outputs[0].parent.iterdir() if path.name.startswith(".")]
    assert left == [], "partial files of a killed run"
    fault_times.add(
        f"{name} killed {kills} times, then finished",
        [end.seconds for end in ended],
        timeout_s=20,
        says="",
        codes=[end.code for end in ended],
    )


def _answered(work: Work) -> int:
    return len(work.outputs[0].read_bytes().splitlines()) if work.outputs[0].exists() else 0


def _wait_for_more(work: Work, ranks: ForkedRanks, number: int, further_s: float) -> None:
    """Wait until so many questions are answered, then `further_s`; or until the ranks end."""
    deadline = time.monotonic() + END_S
    while _answered(work) < number and time.monotonic() < deadline:
        if all(process.exitcode is not None for process in ranks.processes):
            return
        time.sleep(0.005)
    time.sleep(further_s)
