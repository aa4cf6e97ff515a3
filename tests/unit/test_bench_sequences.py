"""Many queries about one document in a benchmark: one by one, together, and while another document is prefilled."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from rich.console import Console

from apb_ds.bench import BenchConfig, run_bench
from apb_ds.bench.config import INTERLEAVED_TOKENS
from apb_ds.bench.interleaving import Interruption, gaps_around, summarise_interruptions
from apb_ds.bench.sequences import Answers, Round, random_queries, summarise_rounds
from apb_ds.engine.batch import Batch
from apb_ds.engine.engine import APBEngine
from apb_ds.engine.pace import Pace
from apb_ds.engine.sequences import Sequence
from apb_ds.report.bench_figures import draw_bench
from apb_ds.report.bench_table import bench_tables
from tests.bench_cases import LAYERS, tiny

Record = dict[str, Any]
NUM_NEW = 5
REPEATS = 2
UNTIMED = 2  # rounds


class Watched:
    """What a benchmark did: its record, and the calls that answer queries."""

    def __init__(self) -> None:
        self.alone: list[tuple[tuple[int, ...], tuple[int, ...]]] = []  # query and answer
        self.batches: list[list[Any]] = []  # handles
        self.prefills: list[str] = []
        self.plain: list[bool] = []
        generate, submit, opened = APBEngine.generate, Batch.submit, APBEngine.batch
        prefill, inside, choose = APBEngine.prefill, Batch.prefill, Sequence.choose

        def note_generate(engine: Any, **given: Any) -> Any:
            answer = generate(engine, **given)
            self.alone.append((tuple(given["query_ids"][0].tolist()), tuple(answer[0].tolist())))
            return answer

        def note_batch(*given: Any) -> Any:
            self.batches.append([])
            return opened(*given)

        def note_submit(batch: Any, *given: Any, **others: Any) -> Any:
            self.batches[-1].append(submit(batch, *given, **others))
            return self.batches[-1][-1]

        def note_prefill(engine: Any, *given: Any, **others: Any) -> Any:
            self.prefills.append("apart")
            return prefill(engine, *given, **others)

        def note_inside(batch: Any, *given: Any, **others: Any) -> Any:
            self.prefills.append("inside")
            return inside(batch, *given, **others)

        def note_choose(*given: Any) -> Any:
            self.plain.append(False)
            return choose(*given)

        with (
            mock.patch.object(APBEngine, "generate", note_generate),
            mock.patch.object(APBEngine, "batch", note_batch),
            mock.patch.object(APBEngine, "prefill", note_prefill),
            mock.patch.object(Batch, "submit", note_submit),
            mock.patch.object(Batch, "prefill", note_inside),
            mock.patch.object(Sequence, "choose", note_choose),
        ):
            values = tiny(
                methods=["dense", "apb"],
                sequences=[3, 1],
                interleave=True,
                repeats=REPEATS,
                warmup=0,
                decode_tokens=NUM_NEW - 1,
            )
            values["model"]["geometry"]["eos_token_id"] = list(range(128))  # any token would end an answer
            self.record = run_bench(values)[0]


@pytest.fixture(scope="module")
def watched() -> Watched:
    return Watched()


def apb(record: Record) -> Record:
    return next(case for case in record["cases"] if case["method"] == "apb")


def printed(record: Record, width: int = 160) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width)
    for table in bench_tables(record):
        console.print(table)
    return stream.getvalue()


def test_every_number_of_queries_is_measured(watched: Watched) -> None:
    case = apb(watched.record)
    assert [found["sequences"] for found in case["sequences"]] == [1, 3]
    for found in case["sequences"]:
        for way in (found["one_by_one"], found["together"]):
            assert len(way["answers"]["runs_s"]) == len(way["step"]["runs_ms"]) == REPEATS
            assert way["tokens_per_s"] == found["sequences"] * NUM_NEW / way["answers"]["median_s"]
            assert 0 < way["first_token_mean"]["median_s"] <= way["first_token_worst"]["median_s"]
            assert way["first_token_worst"]["max_s"] < way["answers"]["max_s"]
            assert way["peak_memory_bytes"] > 0
        gain = found["together"]["tokens_per_s"] / found["one_by_one"]["tokens_per_s"]
        assert found["speedup"] == pytest.approx(gain)
    # 256 tokens a slot; 2 KV heads of 8 channels, keys and values, float32
    assert case["sequences"][1]["together"]["suffix_bytes"] == 3 * 256 * LAYERS * 2 * 2 * 8 * 4
    dense = watched.record["cases"][0]
    assert dense["sequences"] == [] and dense["interleaving"] is None


def test_the_same_queries_get_whole_answers_both_ways(watched: Watched) -> None:
    asked = watched.alone[REPEATS:]  # after the case's own single query in each repeat
    assert len(asked) == UNTIMED + 3 * REPEATS
    assert asked[0] == asked[1] == asked[2] == asked[5] and len(set(asked)) == 3
    together = watched.batches[: 2 * (UNTIMED + REPEATS)]
    assert [len(handles) for handles in together] == [1, 3] * (UNTIMED + REPEATS)
    for handles in together:
        for handle, (query, answer) in zip(handles, asked[UNTIMED:], strict=False):
            assert tuple(handle.request.ids[0].tolist()) == query
            assert tuple(handle.tokens) == answer and len(answer) == NUM_NEW


def test_choosing_stays_one_argmax(watched: Watched) -> None:
    assert watched.plain == []


def test_the_other_document_is_prefilled_both_ways_in_turns(watched: Watched) -> None:
    assert watched.prefills[-2 * (1 + REPEATS) :] == ["apart", "inside"] * (1 + REPEATS)
    found = apb(watched.record)["interleaving"]
    assert found["sequences"] == 3
    assert found["apart"]["gaps"] == [1] * REPEATS
    for name in ("apart", "interleaved"):
        assert len(found[name]["prefill"]["runs_s"]) == REPEATS
        assert found[name]["worst_gap"]["max_s"] >= found[name]["mean_gap"]["min_s"] > 0
    assert found["apart"]["worst_gap"]["min_s"] > found["apart"]["prefill"]["min_s"]
    assert found["slowdown"] == found["interleaved"]["prefill"]["median_s"] / found["apart"]["prefill"]["median_s"]


def test_steps_go_on_inside_the_prefill() -> None:
    with mock.patch.object(Pace, "count", lambda pace: True):
        record = run_bench(tiny(methods=["apb"], sequences=[2], interleave=True, repeats=1, warmup=0))[0]
    found = apb(record)["interleaving"]
    hosts = 4
    assert found["interleaved"]["gaps"] == [hosts * LAYERS + 1] and found["apart"]["gaps"] == [1]


def test_slow_steps_do_not_crowd_out_the_prefill() -> None:
    choose = Batch._choose

    def slow_choice(batch: Batch, *given: Any) -> Any:
        time.sleep(0.25 if batch._pace._done else 0)  # inside a prefill
        return choose(batch, *given)

    with mock.patch.object(Batch, "_choose", slow_choice):
        record = run_bench(tiny(methods=["apb"], sequences=[2], interleave=True, repeats=1, warmup=0))[0]
    (gaps,) = apb(record)["interleaving"]["interleaved"]["gaps"]
    assert gaps < 4 * LAYERS  # after the first of 4 x LAYERS layers, and not after each


def test_gaps_around_a_prefill() -> None:
    times = [1.0, 2.0, 3.5, 7.0, 7.5, 9.0]
    assert gaps_around(times, 4.0, 6.0) == (3.5,)
    assert gaps_around(times, 3.0, 7.2) == (1.5, 3.5, 0.5)
    assert gaps_around(times, 0.5, 1.5) == (1.0,)  # nothing before it
    assert gaps_around(times, 8.0, 10.0) == (1.5,)  # nothing after it


def test_times_are_of_the_slowest_rank_without_the_untimed_round() -> None:
    def answers(total_s: float, peak: int = 5) -> Answers:
        return Answers(total_s, (total_s / 4, total_s / 2), 0.001 * total_s, peak)

    bench = BenchConfig(sequences=(2,), decode_tokens=3)
    untimed = [Round({1: answers(100, 7)}, {2: answers(100, 9)}), Round({1: answers(90, 8)}, {2: answers(90, 6)})]
    timed = [Round({2: answers(8)}, {2: answers(2)}), Round({2: answers(7)}, {2: answers(4)})]
    (found,) = summarise_rounds(bench, [untimed, timed, timed], 11)
    one_by_one, together = found["one_by_one"], found["together"]
    assert (one_by_one["answers"]["runs_s"], together["answers"]["runs_s"]) == ([8], [4])
    assert (one_by_one["tokens_per_s"], together["tokens_per_s"], found["speedup"]) == (1, 2, 2)
    assert together["step"]["runs_ms"] == [4]
    assert (together["first_token_mean"]["runs_s"], together["first_token_worst"]["runs_s"]) == ([1.5], [2])
    assert (one_by_one["peak_memory_bytes"], together["peak_memory_bytes"], together["suffix_bytes"]) == (8, 9, 22)
    apart, inside = [[Interruption(4.0, (5.0,)), Interruption(4.5, ())]], [[Interruption(9.0, (1.0, 2.0, 3.0))]]
    interrupted = summarise_interruptions(apart, inside, 2)
    assert interrupted is not None
    assert (interrupted["slowdown"], interrupted["apart"]["prefill"]["runs_s"]) == (2, [4.5])
    assert interrupted["interleaved"]["worst_gap"]["runs_s"] == [3]
    assert interrupted["interleaved"]["mean_gap"]["runs_s"] == [2]


def test_waiting_one_by_one_counts_from_when_all_were_asked(watched: Watched) -> None:
    one, three = (found["one_by_one"] for found in apb(watched.record)["sequences"])
    for first, worst, whole in zip(
        one["answers"]["runs_s"], three["first_token_worst"]["runs_s"], three["answers"]["runs_s"], strict=True
    ):
        assert first < worst < whole


def test_queries_differ_and_repeat() -> None:
    queries = random_queries(3, 4, 1000, 7)
    assert [query.shape for query in queries] == [(1, 4)] * 3
    assert len({tuple(query[0].tolist()) for query in queries}) == 3
    assert all(map(torch.equal, queries, random_queries(3, 4, 1000, 7)))


def test_positions_are_checked_for_the_longest_answer() -> None:
    assert BenchConfig(query_tokens=3, decode_tokens=4).num_positions(100) == 108
    bench = BenchConfig(query_tokens=3, decode_tokens=4, sequences=(2,), interleave=True)
    assert bench.num_positions(100) == 103 + INTERLEAVED_TOKENS
    with pytest.raises(ValueError, match="need 8228 positions"):
        run_bench(tiny(methods=["apb"], lengths=[8000], sequences=[2], interleave=True))


@pytest.mark.parametrize("width", [80, 160])
def test_the_tables_fit(watched: Watched, width: int) -> None:
    text = printed(watched.record, width)
    assert max(map(len, text.splitlines())) <= width
    assert "many queries about one document" in text and "without the document's prefill" in text
    case = apb(watched.record)
    for found in case["sequences"]:
        assert any(f"{found['speedup']:.2f}x" in line.split() for line in text.splitlines())
    rows = [line.split() for line in text.splitlines()]
    assert any("interleaved" in row and f"{case['interleaving']['slowdown']:.2f}x" in row for row in rows)


def test_the_record_is_json(watched: Watched) -> None:
    assert json.loads(json.dumps(watched.record))["cases"][1]["sequences"][1]["sequences"] == 3


def test_the_figure(watched: Watched, tmp_path: Path) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    labels: list[str] = []
    save = figure.Figure.savefig

    def note(self: Any, *args: Any, **kwargs: Any) -> None:
        labels.extend(self.axes[0].get_legend_handles_labels()[1])
        save(self, *args, **kwargs)

    with mock.patch.object(figure.Figure, "savefig", note):
        drawn = draw_bench(tmp_path, watched.record)
    assert [path.name for path in drawn] == ["speed.png", "sequences.png"]
    assert drawn[1].read_bytes().startswith(b"\x89PNG")
    assert labels[-2:] == ["apb, 4 hosts, 120 tokens: together", "apb, 4 hosts, 120 tokens: one by one"]
