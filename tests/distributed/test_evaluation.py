"""launch/eval.py on one and two ranks: scores, files, resumed jobs, failures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import apb_ds
from apb_ds.engine.batch import Batch
from apb_ds.engine.engine import APBEngine
from apb_ds.report.compare import main
from apb_ds.report.progress import BatchProgress
from tests.launch_in_process import INTERRUPTED, Ended, run_infer
from tests.pool import Pools
from tests.tiny_checkpoint import save_checkpoint

SIZES = pytest.mark.parametrize("world_size", [1, 2])
# A byte is a token here: the shortest document for this task has 260.
GRID = ("task.num_tokens=[300,600]", "task.depth=[0,1]", "task.max_new_tokens=4")


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("evaluation") / "model")


def evaluate(
    pool: Pools, world_size: int, model_path: Path, output: Path, *overrides: str, patches: tuple[str, ...] = ()
) -> list[Ended]:
    arguments = [
        f"model.path={model_path}",
        "model.device=cpu",
        f"eval.output={output}",
        f"hydra.run.dir={output.parent}/run",
        f"hydra.sweep.dir={output.parent}/sweep",
        *overrides,
    ]
    return pool(world_size).run(run_infer, arguments, "", patches, "eval", timeout=120)


def samples(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]


@SIZES
def test_a_grid(pool: Pools, model_path: Path, tmp_path: Path, world_size: int) -> None:
    output = tmp_path / "out"
    ended = evaluate(pool, world_size, model_path, output, *GRID, "method.hosts=2", "task.num_samples=2")
    assert [rank.code for rank in ended] == [0] * world_size, ended[0].stderr
    found = samples(output)
    assert len(found) == 8 and len({sample["reference"] for sample in found}) == 8
    for sample in found:
        assert sample["score"] == float(sample["reference"] in sample["answer"])
        assert sample["labels"]["length"] - 74 < sample["document_tokens"] <= sample["labels"]["length"]
        assert sample["seconds"] >= sample["prefill_s"] > 0
    summary = json.loads((output / "summary.json").read_text())
    cells = [(cell["labels"]["length"], cell["labels"]["depth"], cell["samples"]) for cell in summary["cells"]]
    assert cells == [(300, 0, 2), (300, 1, 2), (600, 0, 2), (600, 1, 2)]
    assert summary["all"]["samples"] == 8 and summary["all"]["score"] is not None
    flops = summary["all"]["prefill_flops"]
    assert flops["total"] == pytest.approx(sum(sample["flops"]["total"] for sample in found) / 8)
    assert (flops["slowest_rank"] == flops["total"]) == (world_size == 1)
    assert summary["cells"][2]["prefill_flops"]["total"] > summary["cells"][0]["prefill_flops"]["total"]
    assert "prefill TFLOP" in ended[0].stdout
    shares = sum(sample["seconds"] - sample["prefill_s"] for sample in found)
    assert 0 < summary["usage"]["decode_s"] < shares
    assert ended[0].records[0]["metrics"]["query_s"] == summary["usage"]["query_s"] > 0
    assert summary["settings"]["method"]["hosts"] == 2 and summary["versions"]["torch"]
    assert f"Results: {output}" in ended[0].stdout and "600" in ended[0].stdout
    assert (output / "scores.png").exists()


@SIZES
def test_an_evaluation_is_resumed(pool: Pools, model_path: Path, tmp_path: Path, world_size: int) -> None:
    output = tmp_path / "out"
    overrides = (*GRID, "method.hosts=2")
    evaluate(pool, world_size, model_path, output, *overrides)
    whole = samples(output)
    lines = (output / "samples.jsonl").read_text().splitlines(keepends=True)
    (output / "samples.jsonl").write_text("".join(lines[:2]) + lines[2][:40])  # killed while writing the third
    ended = evaluate(pool, world_size, model_path, output, *overrides)
    assert ended[0].records[0]["metrics"]["resumed"] == 2
    again = samples(output)
    assert [(sample["id"], sample["answer"]) for sample in again] == [(s["id"], s["answer"]) for s in whole]
    assert again[:2] == whole[:2]
    refused = evaluate(pool, world_size, model_path, output, *overrides, "method.compressor=knorm")
    assert refused[0].code == 2 and "method.compressor" in refused[0].stderr
    assert samples(output) == again


@SIZES
def test_samples_that_decode_together_are_answered_as_one_by_one(
    pool: Pools, model_path: Path, tmp_path: Path, world_size: int
) -> None:
    """Anchors differ between the lengths, and one sample of a group does not fit; then a run is stopped and resumed."""
    task = ("task.num_tokens=[300,700,400]", "task.depth=[0,1]", "task.max_new_tokens=4", "task.digits=random")
    overrides = (*task, "method.hosts=2", "+model.overrides.max_position_embeddings=500")
    found = {}
    for sequences in (1, 3, 8):
        evaluate(pool, world_size, model_path, tmp_path / f"{sequences}", *overrides, f"eval.sequences={sequences}")
        found[sequences] = samples(tmp_path / f"{sequences}")
    kept = [[(one["id"], one.get("answer"), one.get("flops")) for one in found[sequences]] for sequences in found]
    assert kept[0] == kept[1] == kept[2]
    assert ["error" in sample for sample in found[3]] == [False, False, True, True, False, False]
    for sample in found[3]:
        assert "error" in sample or sample["seconds"] > sample["prefill_s"] > 0

    output = tmp_path / "stopped"
    stopped = evaluate(
        pool, world_size, model_path, output, *overrides, "eval.sequences=4", patches=("interrupted at the third line",)
    )
    assert [rank.code for rank in stopped] == [INTERRUPTED] * world_size
    assert len([sample for sample in samples(output) if "answer" in sample]) == 2
    ended = evaluate(pool, world_size, model_path, output, *overrides, "eval.sequences=4")
    assert ended[0].records[0]["metrics"]["resumed"] == 2
    assert [(one["id"], one.get("answer"), one.get("flops")) for one in samples(output)] == kept[0]


def test_memory_that_runs_out_next_to_other_samples(model_path: Path, tmp_path: Path) -> None:
    """In a prefill while three contexts are there, then in a step: all samples are answered all the same."""
    arguments = [f"model.path={model_path}", "model.device=cpu", "method.hosts=2", *GRID, "task.num_samples=2"]

    def run(name: str) -> list[Any]:
        ended = run_infer(
            0, 1, [*arguments, f"eval.output={tmp_path}/{name}", f"hydra.run.dir={tmp_path}/run"], config="eval"
        )
        assert ended.code == 0, ended.stderr
        return [(sample["id"], sample["answer"]) for sample in samples(tmp_path / name)]

    expected = run("whole")
    prefill, step, calls = APBEngine.prefill, Batch.step, {"prefill": 0, "step": 0}

    def failing(name: str, at: int, work: Any) -> Any:
        def fail_once(self: Any, *given: Any, **named: Any) -> Any:
            calls[name] += 1
            if calls[name] == at:
                raise torch.OutOfMemoryError("no memory")
            return work(self, *given, **named)

        return fail_once

    with (
        mock.patch.object(APBEngine, "prefill", failing("prefill", 4, prefill)),
        mock.patch.object(Batch, "step", failing("step", 2, step)),
    ):
        assert run("short of memory") == expected
    assert calls["prefill"] == 9, "one again"


@SIZES
def test_a_failing_sample_is_counted(pool: Pools, model_path: Path, tmp_path: Path, world_size: int) -> None:
    """The long documents exceed the model's positions; the short ones have blocks shorter than the anchor."""
    output = tmp_path / "out"
    overrides = (*GRID, "method.hosts=4", "method.anchor_length=80", "+model.overrides.max_position_embeddings=400")
    ended = evaluate(pool, world_size, model_path, output, *overrides)
    found = samples(output)
    assert ["error" in sample for sample in found] == [False, False, True, True]
    assert "max_position_embeddings=400" in found[2]["error"]
    assert [rank.code for rank in ended] == [2] * world_size and "2 of 4 samples failed" in ended[0].stderr
    numbers = json.loads((output / "summary.json").read_text())["all"]
    assert (numbers["failed"], numbers["exact"], numbers["score"]) == (2, 2, None)


def test_methods_on_the_same_samples(pool: Pools, model_path: Path, tmp_path: Path) -> None:
    arguments = [
        f"model.path={model_path}",
        "model.device=cpu",
        "-m",
        "method=ring,apb",
        *GRID,
        f"hydra.sweep.dir={tmp_path}",
    ]
    arguments.append(f"eval.output='{tmp_path}/${{method.method}}'")
    ended = pool(2).run(run_infer, arguments, "", (), "eval", timeout=120)
    assert [record["status"] for record in ended[0].records] == ["ok", "ok"], ended[0].stderr
    ring, apb = (samples(tmp_path / name) for name in ("ring", "apb"))
    assert [sample["fingerprint"] for sample in ring] == [sample["fingerprint"] for sample in apb]
    assert all(sample["exact"] for sample in ring)
    closing = ended[0].stdout
    assert "difference to ring" in closing and "unpaired" in closing and not ended[1].stdout
    compared = tmp_path / "compared.json"
    assert main([str(tmp_path / "ring"), str(tmp_path / "apb"), "--out", str(compared)]) == 0
    over_all = next(pair for pair in json.loads(compared.read_text())["pairs"] if pair["labels"] is None)
    differences = [one["score"] - two["score"] for one, two in zip(apb, ring, strict=True) if not one["exact"]]
    assert over_all["samples"] == len(differences) > 0
    assert over_all["difference"] == pytest.approx(sum(differences) / len(differences))


def expected_divergence(model_path: Path, text: str, **method: Any) -> dict[str, float]:
    """Return the measures from plain logits and an engine's logits, with the formulas written out."""
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[:, :240]
    document, judged = ids[:, :200], ids[:, 200:]
    with torch.no_grad():
        exact = model(ids).logits[0, 200:].double()
    engine = apb_ds.init_inference(model, apb_ds.APBConfig(**method))
    ours = engine.query_logits(judged, context=engine.prefill(document))[0].double()
    p, q = exact.softmax(-1), ours.softmax(-1)
    chosen = q[torch.arange(39), judged[0, 1:]]
    return {
        "kl": float((p * (p / q).log()).sum(-1).mean()),
        "top1": float((p.argmax(-1) == q.argmax(-1)).double().mean()),
        "perplexity": float((-chosen.log().mean()).exp()),
    }


@SIZES
def test_fidelity(pool: Pools, model_path: Path, tmp_path: Path, world_size: int) -> None:
    texts = {"sea.txt": "The sea is wide and the boat is small. ", "hill.txt": "Up the hill and down again we went. "}
    (tmp_path / "texts").mkdir()
    for name, text in texts.items():
        (tmp_path / "texts" / name).write_text(text * 8)
    task = ("task=fidelity", f"task.texts={tmp_path}/texts", "task.num_tokens=200", "task.judged_tokens=40")
    output = tmp_path / "out"
    ended = evaluate(pool, world_size, model_path, output, *task, "method.hosts=4")
    assert [rank.code for rank in ended] == [0] * world_size, ended[0].stderr
    found = {sample["labels"]["text"]: sample for sample in samples(output)}
    for name, text in texts.items():
        measures = found[name]["measures"]
        for measure, value in expected_divergence(model_path, text * 8, hosts=4).items():
            assert measures[measure] == pytest.approx(value, rel=2e-3, abs=1e-4), measure
        assert found[name]["flops"]["query"] > 0
        assert 0 < measures["attention_error"] < 1 and len(found[name]["attention_errors"]) == 3
    table = ended[0].stdout
    assert "kl" in table and "attention error" in table and "hill.txt" in table
    # An exact method differs in nothing.
    exact = evaluate(pool, world_size, model_path, tmp_path / "exact", *task, "method=ring")
    measures = exact[0].records[0]["metrics"]["measures"]
    assert measures["kl"]["mean"] < 1e-6 and measures["top1"]["mean"] == 1.0
    assert measures["attention_error"]["mean"] < 1e-4
    # The query compressor scores with the document's last tokens.
    observed = evaluate(
        pool, world_size, model_path, tmp_path / "query", *task, "method.compressor=query", "method.hosts=2"
    )
    assert observed[0].code == 0, observed[0].stderr


def test_the_bar_of_a_fidelity_job_moves(model_path: Path, tmp_path: Path) -> None:
    """Layer by layer, through both prefills."""
    (tmp_path / "text.txt").write_text("The lamp on the pier is lit at dusk. " * 8)
    task = ("task=fidelity", f"task.texts={tmp_path}/text.txt", "task.num_tokens=200", "task.judged_tokens=40")
    places: list[float] = []

    def show(self: BatchProgress) -> None:
        places.append(self._bytes_before + self._bytes_now)

    arguments = [f"model.path={model_path}", "model.device=cpu", "method.hosts=4", f"eval.output={tmp_path}/out", *task]
    with mock.patch.object(BatchProgress, "_show", show):
        ended = run_infer(0, 1, [*arguments, f"hydra.run.dir={tmp_path}/run"], config="eval")
    assert ended.code == 0, ended.stderr
    assert places == sorted(places) and places[-1] == 200
    assert any(0 < place < 100 for place in places) and any(100 < place < 200 for place in places)


@pytest.mark.parametrize(
    ("overrides", "config", "parts"),
    [
        (("task=chat", "task.document=x"), "eval", ("task=chat", "launch/infer.py")),
        (("task=passkey_grid",), "infer", ("several samples", "launch/eval.py")),
        (("task.num_samples=3", "task.digits=12"), "eval", ("task.num_samples=3", "task.digits=random")),
        (("task.depth=[0,2]",), "eval", ("task.depth=2", "[0, 1]")),
        (("task.num_tokens=[]",), "eval", ("task.num_tokens", "at least")),
        (("task=fidelity", "task.texts=/nowhere/at/all"), "eval", ("task.texts", "/nowhere/at/all")),
        (("task=fidelity", "task.num_tokens=500000"), "eval", ("task.num_tokens=500000", "tokens")),
        (("task.template={style: 1}",), "eval", ("task.template.style", "no effect")),
        (("eval.overwrite=1",), "eval", ("eval.overwrite=1", "true or false")),
        (("eval.sequences=0",), "eval", ("eval.sequences=0", "at least 1")),
        (("eval.output=/proc/nowhere",), "eval", ("eval.output: /proc/nowhere", "another eval.output")),
    ],
)
@SIZES
def test_what_cannot_be_evaluated(
    pool: Pools,
    model_path: Path,
    tmp_path: Path,
    overrides: tuple[str, ...],
    config: str,
    parts: tuple[str, ...],
    world_size: int,
) -> None:
    arguments = [f"model.path={model_path}", "model.device=cpu", f"hydra.run.dir={tmp_path}/run", *overrides]
    ended = pool(world_size).run(run_infer, arguments, "", (), config, timeout=60)
    assert [rank.code for rank in ended] == [2] * world_size
    for part in parts:
        assert part in ended[0].stderr, ended[0].stderr
