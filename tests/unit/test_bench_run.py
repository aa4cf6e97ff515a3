"""A tiny benchmark from its config to its record, table and figures."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from rich.console import Console

from apb_ds.bench import BenchConfig, plain, run_bench
from apb_ds.bench.config import METHODS
from apb_ds.bench.emulate import EmulatedTimes, communication_s, in_step_s, slowest_rank, summarise_ranks
from apb_ds.bench.run import make_sample
from apb_ds.config import APBConfig
from apb_ds.engine.engine import APBEngine
from apb_ds.plan import plan_request
from apb_ds.report.bench_figures import draw_bench
from apb_ds.report.bench_table import bench_tables
from apb_ds.report.record import write_json
from tests.bench_cases import LAYERS, tiny

Record = dict[str, Any]


@pytest.fixture(scope="module")
def measured() -> Record:
    """Every method on one rank."""
    return run_bench(tiny(methods=list(METHODS), lengths=[96, 120], hosts=[2, 4], breakdown=True))[0]


@pytest.fixture(scope="module")
def emulated() -> Record:
    """Every method that can be emulated, over two ranks, and dense."""
    methods = ["dense", "apb", "star", "ring", "ulysses"]
    return run_bench(tiny(methods=methods, emulate_ranks=2, breakdown=True, repeats=3))[0]


def printed(record: Record, width: int = 160) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width)
    for table in bench_tables(record):
        console.print(table)
    return stream.getvalue()


def by_method(record: Record) -> dict[str, Record]:
    return {case["method"]: case for case in record["cases"]}


def test_the_record_is_kept_after_each_run() -> None:
    kept: list[Record] = []

    def stop_at_the_fifth(record: Record) -> None:
        kept.append(json.loads(json.dumps(record)))
        if len(kept) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_bench(tiny(methods=["dense", "apb"], lengths=[96, 120], repeats=2, warmup=1), stop_at_the_fifth)
    assert [record["complete"] for record in kept] == [False] * 5
    runs = [
        [(case["document_tokens"], case["method"], len(case["prefill"]["runs_s"])) for case in record["cases"]]
        for record in kept
    ]
    assert runs[0] == [(96, "dense", 1)]  # nothing after the warm-up
    assert runs[1] == [(96, "dense", 1), (96, "apb", 1)]
    assert runs[3] == [(96, "dense", 2), (96, "apb", 2)]
    assert runs[4] == [*runs[3], (120, "dense", 1)]
    assert "96" in printed(kept[1])


def test_every_case_is_measured(measured: Record) -> None:
    # apb and star with two numbers of hosts, the others once, at two lengths
    assert len(measured["cases"]) == 2 * (5 + 2 * 2) and measured["complete"]
    for case in measured["cases"]:
        assert case["status"] == "ok" and not case["emulated"]
        for name, unit in (("prefill", "s"), ("query", "s"), ("decode", "ms_per_token")):
            spread = case[name]
            assert len(spread[f"runs_{unit}"]) == 2
            assert 0 < spread[f"min_{unit}"] <= spread[f"median_{unit}"] <= spread[f"max_{unit}"]
        assert case["tokens_per_s"] == case["document_tokens"] / case["prefill"]["median_s"]
        assert case["prefill_bytes_sent"] == case["answer_bytes_sent"] == [0]
        assert case["peak_memory_bytes"] >= case["prefill_peak_memory_bytes"] > 0
        assert case["clocks"] is None and case["ranks"] == 1
        (parts,) = case["breakdown"]
        assert parts["parts_s"]["ffn"] > 0 and parts["prefill_over_products"] > 0


def test_kernels_and_settings_are_recorded(measured: Record) -> None:
    cases = by_method(measured)
    assert cases["dense"]["kernels"]["prefill"] == "sdpa" and cases["dense"]["settings"] is None
    assert cases["apb"]["kernels"]["prefill"] == "cpu_flash"
    assert cases["apb"]["settings"]["anchor_length"] == 12
    assert (cases["apb"]["anchor_length"], cases["apb"]["passing_length"]) == (12, 5)
    assert not cases["apb"]["exact"] and cases["ring"]["exact"]
    assert set(measured["versions"]) >= {"torch", "transformers", "deepspeed"}
    assert measured["hardware"]["device"] == "cpu" and "commit" in measured["git"]


def test_speedups(measured: Record) -> None:
    for length in (96, 120):
        cases = [case for case in measured["cases"] if case["document_tokens"] == length]
        baseline = cases[0]
        assert baseline["method"] == measured["baseline"] == "dense" and baseline["speedup"] == 1
        for case in cases:
            assert case["speedup"] == baseline["prefill"]["median_s"] / case["prefill"]["median_s"]


def test_the_title_shows_fewer_layers(measured: Record) -> None:
    assert measured["model"]["layers"] == {"measured": LAYERS, "of": 3}
    assert measured["model"]["random_weights"]
    assert f"{LAYERS} of 3 layers measured" in printed(measured)


def test_the_title_does_not_mention_all_layers() -> None:
    values = tiny(methods=["apb"], repeats=1, warmup=0)
    values["model"]["num_layers"] = None
    record = run_bench(values)[0]
    assert record["model"]["layers"] == {"measured": 3, "of": 3}
    assert "layers measured" not in printed(record)


def test_the_table_has_a_row_for_each_case(measured: Record) -> None:
    text = printed(measured)
    for method in METHODS:
        assert sum(line.split()[1:2] == [method] for line in text.splitlines()) >= 2, method
    assert "emulated" not in text


def test_each_repeat_has_a_new_document_shared_by_all_cases() -> None:
    bench = BenchConfig()
    seen = [make_sample(bench, 50, 1000, 0, repeat).document_ids for repeat in range(-1, 4)]
    for number, ids in enumerate(seen):
        assert ids.shape == (1, 50)
        assert not any(torch.equal(ids, other) for other in seen[:number])
    assert torch.equal(seen[2], make_sample(bench, 50, 1000, 0, 1).document_ids)
    assert not torch.equal(seen[2], make_sample(bench, 50, 1000, 1, 1).document_ids)


def test_cases_take_turns_on_the_same_document() -> None:
    asked: list[tuple[int, bytes]] = []

    def note(model: Any, document_ids: torch.Tensor) -> Any:
        asked.append((0, document_ids.numpy().tobytes()))
        return plain_prefill(model, document_ids)

    plain_prefill, engine_prefill = plain.prefill, APBEngine.prefill

    def note_engine(engine: Any, document_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        asked.append((1, document_ids.numpy().tobytes()))
        return engine_prefill(engine, document_ids, *args, **kwargs)

    with (
        mock.patch.object(plain, "prefill", note),
        mock.patch.object(APBEngine, "prefill", note_engine),
    ):
        run_bench(tiny(methods=["dense", "apb"], repeats=2, warmup=1, decode_tokens=0))
    assert [method for method, _ in asked] == [0, 1] * 3
    assert [asked[index][1] == asked[index + 1][1] for index in (0, 2, 4)] == [True] * 3
    assert len({ids for _, ids in asked}) == 3


def test_prefill_only() -> None:
    record = run_bench(tiny(methods=["dense", "apb"], repeats=1, warmup=0, decode_tokens=0))[0]
    assert all("query" not in case and "decode" not in case for case in record["cases"])
    assert "ms/token" not in printed(record)


def test_emulated_ranks(emulated: Record) -> None:
    cases = by_method(emulated)
    assert emulated["emulated"] and not cases["dense"]["emulated"] and "query" in cases["dense"]
    assert emulated["link"]["gb_per_s"] == 50
    for method in ("apb", "star", "ring", "ulysses"):
        case = cases[method]
        ranks = case["emulated_ranks"]
        assert case["emulated"] and case["ranks"] == 2 and [rank["rank"] for rank in ranks] == [0, 1]
        assert "query" not in case and "decode" not in case
        assert all(len(rank["round_median_s"]) == case["rounds"] for rank in ranks)
        assert case["prefill_bytes_sent"] == [rank["bytes_sent"] for rank in ranks] and ranks[0]["bytes_sent"] > 0
        assert case["in_step"]["median_s"] >= case["prefill"]["median_s"] * (1 - 1e-9)
        hidden, open_ = case["estimate_s"]
        assert open_ - hidden == pytest.approx(case["communication_s"])
        assert case["speedup"] is not None
    assert cases["apb"]["rounds"] == 2 and cases["ring"]["rounds"] == 1
    assert sorted(host for rank in cases["apb"]["emulated_ranks"] for host in rank["hosts"]) == [0, 1, 2, 3]


def test_bytes_sent_match_a_count_by_hand(emulated: Record) -> None:
    """Keys and values of 2 KV heads of 8 channels, in all layers but the last, to one other rank."""
    per_token = 2 * 2 * 8 * 4
    cases = by_method(emulated)
    anchor, kept = 12 // 2, 2 * 5
    assert cases["apb"]["prefill_bytes_sent"] == [(LAYERS - 1) * per_token * (anchor + kept)] * 2
    assert cases["ring"]["prefill_bytes_sent"] == [(LAYERS - 1) * per_token * 60] * 2
    assert [rank["collectives"] for rank in cases["apb"]["emulated_ranks"]] == [(LAYERS - 1) * 3] * 2


def test_tables_and_names_say_emulated(emulated: Record, tmp_path: Path) -> None:
    text = printed(emulated)
    assert "ranks emulated" in text.splitlines()[0] + text.splitlines()[1]
    for method in ("apb", "star", "ring", "ulysses"):
        lines = [line for line in text.splitlines() if line.split()[1:2] in ([method], [method + ","])]
        assert lines and all("emulated" in line for line in lines), method
    assert all("emulated" in case["name"] for case in emulated["cases"] if case["emulated"])
    assert "computation of the slowest rank" in text and "50 GB/s" in text


def test_the_breakdown_is_of_the_slowest_rank(emulated: Record) -> None:
    for case in emulated["cases"]:
        (parts,) = case["breakdown"]
        if case["emulated"]:
            medians = [rank["compute"]["median_s"] for rank in case["emulated_ranks"]]
            assert parts["rank"] == medians.index(max(medians))
            assert parts["parts_s"]["communication"] > 0


def rank_times(rank: int, *round_s: float, collectives: tuple[int, ...] = (50, 50)) -> EmulatedTimes:
    return EmulatedTimes(rank, round_s, collectives, 10**9, 7 + rank, plan_request(APBConfig(hosts=4), 1000, 0, 2))


def test_ranks_in_step_wait_for_each_other_in_every_round() -> None:
    bench = BenchConfig(emulate_ranks=2, link_gb_per_s=10, link_latency_us=1000)
    runs = [[rank_times(0, 1.0, 5.0), rank_times(1, 4.0, 1.5)], [rank_times(0, 1.0, 5.0), rank_times(1, 4.0, 3.0)]]
    summary = summarise_ranks(bench, runs)
    assert summary["prefill"]["runs_s"] == [6.0, 7.0]
    assert summary["in_step"]["runs_s"] == [9.0, 9.0]
    assert communication_s(bench, runs[0][0]) == pytest.approx(0.1 + 0.1)
    assert summary["estimate_s"] == pytest.approx([9.0, 9.2])
    assert summary["peak_memory_bytes"] == 8
    assert summary["emulated_ranks"][1]["round_median_s"] == [4.0, 2.25]
    assert slowest_rank(runs) == 1


def test_ranks_wait_only_in_rounds_with_collectives() -> None:
    times = ((1.0, 5.0, 1.0), (4.0, 1.5, 2.0))

    def in_step(*collectives: int) -> float:
        return in_step_s([rank_times(rank, *times[rank], collectives=collectives) for rank in range(2)])

    assert in_step(0, 0, 0) == 7.5  # the slower of both sums
    assert in_step(3, 0, 0) == 4 + 6
    assert in_step(3, 0, 3) == 4 + 5 + 2
    assert in_step(3, 3, 3) == 4 + 5 + 2


def test_emulated_ranks_share_copies_of_the_weights() -> None:
    values = tiny(methods=["apb"], emulate_ranks=4, repeats=1, warmup=0)
    values["model"]["shard_weights"] = True
    sent = {}
    for shard_ranks in (1, 2, 4):
        values["parallel"] = {"shard_ranks": shard_ranks}
        record = run_bench(values)[0]
        assert record["model"]["shard_weights"] is True
        sent[shard_ranks] = record["cases"][0]["gathers"]["bytes_sent"]
    assert sent[1] == 0 and sent[2] / (1 / 2) == sent[4] / (3 / 4) > 0
    values["parallel"] = {"shard_ranks": 3}
    with pytest.raises(ValueError, match=r"parallel\.shard_ranks=3 must be a divisor of the number of ranks \(4\)"):
        run_bench(values)


@pytest.mark.parametrize("which", ["measured", "emulated"])
def test_the_record_is_json(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    record = request.getfixturevalue(which)
    write_json(tmp_path / "bench.json", record)
    assert json.loads((tmp_path / "bench.json").read_text())["cases"][0]["method"] == "dense"


@pytest.mark.parametrize("which", ["measured", "emulated"])
def test_figures(which: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    drawn = draw_bench(tmp_path, request.getfixturevalue(which))
    assert [path.name for path in drawn] == ["speed.png", "breakdown.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_figures_say_emulated(emulated: Record, tmp_path: Path) -> None:
    figure = pytest.importorskip("matplotlib.figure")
    texts: list[str] = []
    save = figure.Figure.savefig

    def note(self: Any, *args: Any, **kwargs: Any) -> None:
        (axes,) = self.axes
        texts.append(" ".join([axes.get_title(), axes.get_ylabel(), *(t.get_text() for t in axes.get_yticklabels())]))
        save(self, *args, **kwargs)

    with mock.patch.object(figure.Figure, "savefig", note):
        draw_bench(tmp_path, emulated)
    assert len(texts) == 2 and all("emulated" in text for text in texts)
    assert "apb, 4 hosts, 2 emulated ranks" in texts[1]


def test_no_figure_without_matplotlib(
    measured: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("apb_ds.report.figures.importlib.util.find_spec", lambda name: None)
    assert draw_bench(tmp_path, measured) == [] and "matplotlib is not installed" in caplog.text


def test_out_of_memory_ends_the_case_alone() -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with mock.patch.object(plain, "prefill", full):
        record = run_bench(tiny(methods=["dense", "apb"], breakdown=True))[0]
    cases = by_method(record)
    assert cases["dense"]["status"] == "failed" and "out of memory" in cases["dense"]["error"]
    assert cases["apb"]["status"] == "ok" and cases["apb"]["speedup"] is None
    assert "CUDA out of memory" in printed(record)


@pytest.mark.parametrize(
    ("bench", "message"),
    [
        ({"methods": ["ulysses"], "emulate_ranks": 3}, "method=ulysses shares heads over ranks"),
        ({"methods": ["apb"], "emulate_ranks": 3}, "hosts=4 must be a multiple"),
        ({"methods": ["apb"], "kernels": ["flash"]}, "bench.kernels='flash' is not known"),
        ({"methods": ["apb"], "kernels": ["torch_flash"]}, "it runs on cuda"),
        ({"methods": ["dense", "apb"], "lengths": [96, 9000]}, "need 9007 positions"),
    ],
)
def test_bad_settings_are_refused_before_measuring(bench: dict[str, Any], message: str) -> None:
    with mock.patch("apb_ds.bench.run._measure_length", side_effect=AssertionError), pytest.raises(ValueError) as told:
        run_bench(tiny(**bench))
    assert message in str(told.value)


def test_lengths_default_to_the_tasks() -> None:
    record = run_bench(tiny(methods=["apb"], repeats=1, warmup=0))[0]
    assert [case["document_tokens"] for case in record["cases"]] == [120]
    values = tiny(methods=["apb"])
    values["task"] = {"name": "prompt", "document": "text", "query": "what"}
    with pytest.raises(ValueError, match=r"bench\.lengths is missing, and task=prompt has no num_tokens"):
        run_bench(values)


def test_the_table_marks_documents_that_run_exact() -> None:
    record = run_bench(tiny(methods=["apb"], lengths=[30], repeats=1, warmup=0))[0]
    assert record["cases"][0]["exact"]
    assert "apb (exact)" in printed(record) and "too short" in printed(record)
