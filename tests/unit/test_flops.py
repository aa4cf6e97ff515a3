"""Operations of a prefill: against torch's count, against the reference's mask, and by hand."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from apb_ds.compressors import compressor_names
from apb_ds.config import APBConfig
from apb_ds.plan import plan_request
from apb_ds.report.flops import ModelSizes, RankFlops, count_flops
from apb_ds.session.metrics import count_prefill
from tests import models
from tests.flop_counting import run_counted
from tests.launch_in_process import run_infer
from tests.models import build_model, request_ids
from tests.reference import run_reference
from tests.tiny_checkpoint import save_checkpoint

SIZES = ModelSizes(num_layers=3, hidden_size=64, intermediate_size=96, heads=4, kv_heads=2, head_dim=16, vocab_size=512)
APB: dict[str, Any] = {"hosts": 4, "anchor_length": 12, "passing_length": 5}


@pytest.mark.parametrize("family", ["llama", "yi", "qwen3", "phi3", "gemma3", "qwen2_mixed"])
@pytest.mark.parametrize(
    ("n", "given"),
    [
        (50, {"method": "dense"}),
        (101, APB),
        (101, APB | {"shard_anchor": False, "compressor": "query"}),
        (101, APB | {"compressor": "keydiff", "anchor_length": 0}),
        (101, {"method": "star", "hosts": 3}),
        (30, {"hosts": 3, "anchor_length": 20}),
        (3, {"hosts": 4, "anchor_length": 0, "passing_length": 1}),
    ],
    ids=["dense", "apb", "query", "no anchor", "star", "exact", "few tokens"],
)
def test_matches_torchs_count(family: str, n: int, given: dict[str, Any]) -> None:
    prefilled, asked, counted = run_counted(0, 1, family, n, given)
    assert counted is not None
    assert (counted["total"], counted["slowest_rank"], counted["query"]) == (prefilled, prefilled, asked)
    assert counted["total"] == sum(counted["parts"].values())


@pytest.mark.parametrize("compressor", compressor_names())
def test_scoring_of_every_compressor(compressor: str) -> None:
    prefilled, _, counted = run_counted(0, 1, "llama", 101, APB | {"compressor": compressor})
    assert counted is not None and counted["total"] == prefilled


@pytest.mark.parametrize("given", [APB, {"hosts": 3, "anchor_length": "block", "passing_length": 0}])
def test_pairs_match_the_mask(given: dict[str, Any]) -> None:
    document, query = request_ids(101, 6)
    judge = run_reference(build_model("llama"), document, query, **given)
    masks = judge.masks[0][0]
    start, stop = judge.layout.document_start, judge.layout.query_start
    counted = count_flops(SIZES, plan_request(APBConfig(**given), 101, 6), query_length=6)
    pair = 4 * 2 * 4 * 16  # products with keys and values, two of three layers, heads, their size
    assert counted.part("anchor_attention") == pair * int(masks[:start, :start].sum())
    assert counted.part("to_anchor") == pair * int(masks[start:stop, :start].sum())
    within = counted.part("block_attention") + counted.part("to_passed")
    assert within == pair * int(masks[start:stop, start:stop].sum())


def test_parts_by_hand() -> None:
    """Two hosts with 10 tokens each, an anchor of 4, 3 passed; the last layer computes its first projections only."""
    sizes = ModelSizes(num_layers=2, hidden_size=8, intermediate_size=16, heads=2, kv_heads=1, head_dim=4, vocab_size=5)
    config = APBConfig(hosts=2, anchor_length=4, passing_length=3, schedule="natural", shard_anchor=False)
    before, after = 8 * 8 + 2 * 8 * 4, 8 * 8 + 3 * 8 * 16
    token, pair = 2 * (2 * before + after), 4 * 8
    expected = RankFlops(
        document_linear=10 * token,
        anchor_linear=4 * token,
        block_attention=55 * pair,
        anchor_attention=10 * pair,
        scoring=2 * 7 * 10,
    )
    compressor = SimpleNamespace(score_products=lambda tokens, *_: 7 * tokens)
    first, second = count_flops(sizes, plan_request(config, 20, 0, 2), compressor=compressor).ranks
    assert first == expected
    assert second == RankFlops(
        **vars(expected) | {"to_anchor": 10 * 4 * pair, "to_passed": 10 * 3 * pair, "scoring": 0}
    )
    # A query of 2: both ranks feed it, each attends to its 10 tokens, the last one to the query, too.
    asked = count_flops(sizes, plan_request(config, 20, 0, 2), query_length=2)
    linear = 2 * (2 * 2 * (before + after) + 8 * 5)
    assert [rank.query for rank in asked.ranks] == [linear + 2 * pair * 20, linear + 2 * pair * 23]


def test_a_shared_anchor_is_counted_once() -> None:
    counts = {}
    for shared in (True, False):
        plan = plan_request(APBConfig(**APB, shard_anchor=shared), 400, 6, 4)
        counts[shared] = count_flops(SIZES, plan)
    for part in ("anchor_linear", "anchor_attention"):
        assert counts[False].part(part) == 4 * counts[True].part(part)
    assert counts[False].part("to_anchor") == counts[True].part("to_anchor")
    assert counts[True].slowest_rank < counts[False].slowest_rank


def test_configs_without_sizes_are_not_counted() -> None:
    engine: Any = SimpleNamespace(
        module=models.llama(), attention=SimpleNamespace(compressor=None), layers=(), weights=None
    )
    context: Any = SimpleNamespace(plan=plan_request(APBConfig(method="dense"), 8, 0))
    assert count_prefill(engine, context, 2) is not None
    engine.module.model.layers[1].mlp.extra = engine.module.model.layers[0].mlp.up_proj.__class__(64, 96)
    assert count_prefill(engine, context, 2) is None, "experts, say"
    assert ModelSizes.from_config(SimpleNamespace(num_attention_heads=4, hidden_size=64)) is None


def test_a_question_records_its_flops(tmp_path: Path) -> None:
    model_path = save_checkpoint(tmp_path / "model")
    arguments = [f"model.path={model_path}", "model.device=cpu", "method.hosts=2", "task=prompt", "task.query=hi"]
    arguments += ["task.document='A lamp stands on the pier, and nobody comes.'", f"hydra.run.dir={tmp_path}/run"]
    ended = run_infer(0, 1, [*arguments, "task.max_new_tokens=2"])
    assert ended.code == 0, ended.stderr
    flops = ended.records[0]["metrics"]["prefill_flops"]
    assert flops["total"] == flops["slowest_rank"] == sum(flops["parts"].values()) > 0 < flops["query"]
    shown = f"{flops['total'] / 1e12:.3g}"
    assert f"prefill TFLOP, all ranks / slowest {shown} / {shown}" in " ".join(ended.stdout.split())


def test_does_not_import_torch() -> None:
    script = "import sys, apb_ds.report.flops; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 0
