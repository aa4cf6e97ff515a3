"""benchmarks/shards.py and stages.py: both ways to hold a model are measured, and give the same answer."""

from __future__ import annotations

import json
from pathlib import Path

from tests.pool import Pools
from tests.tiny_checkpoint import save_checkpoint


def run(rank: int, world_size: int, out: str) -> None:
    from benchmarks import shards

    sizes = ["--hidden", "256", "--layers", "3", "--num-tokens", "300", "--num-new", "4", "--repeats", "2"]
    shards.main(["--out", out, *sizes])


def test_whole_and_sharded_weights_are_measured(pool: Pools, tmp_path: Path) -> None:
    out = tmp_path / "shards.json"
    pool(2).run(run, str(out), timeout=120)
    record = json.loads(out.read_text(encoding="utf-8"))
    whole, sharded = record["whole"][1], record["sharded"][1]
    assert record["ranks"] == 2 and record["same_answers"] is True
    assert not whole["shard_weights"] and sharded["shard_weights"]
    of_layer = 256 * (256 + 2 * 64 + 256) + 3 * 256 * 256 * 7 // 2  # the projections, and the gated MLP's
    replicated = 2 * (8192 * 256 + 7 * 256)  # bytes of the embedding and the norms
    assert whole["weight_bytes"] == 2 * (3 * of_layer + 8192 * 256) + replicated
    assert sharded["weight_bytes"] == (3 * of_layer + 8192 * 256) + replicated
    assert sharded["gathered_bytes_a_prefill"] == 3 * of_layer * sharded["rounds"]
    assert len(sharded["prefill_s"]) == len(whole["ms_per_token"]) == 2


def run_stages(rank: int, world_size: int, model: str, out: str) -> None:
    from benchmarks import stages

    sizes = ["--num-tokens", "403", "--hosts", "4", "--num-new", "3", "--repeats", "2"]
    stages.main(["--out", out, "--model", model, *sizes])


def test_the_whole_model_and_stages_are_measured(pool: Pools, tmp_path: Path) -> None:
    out = tmp_path / "stages.json"
    pool(2).run(run_stages, str(save_checkpoint(tmp_path / "model")), str(out), timeout=120)
    record = json.loads(out.read_text(encoding="utf-8"))
    whole, staged = record["measured"]
    assert record["same_answers"] is True and (whole["stages"], staged["stages"]) == (1, 2)
    assert staged["bubble_of_equal_rounds"] == 1 / 5 and all(0 < bubble < 1 for bubble in staged["bubble"])
    for run in staged["runs"]:
        first, second = (of_rank["rounds"] for of_rank in run)
        assert len(first) == len(second) == 4
        assert all(sent[1] <= began for sent, (began, _) in zip(first, second, strict=True))
        # All tokens, of which each round's travel once, and the anchor's.
        num_tokens = 403 + anchor_of(403, 4)
        assert [of_rank["bytes_between_stages"] for of_rank in run] == [num_tokens * 64 * 4, 0]
    assert [of_rank["bytes_between_stages"] for of_rank in whole["runs"][0]] == [0, 0]


def anchor_of(num_tokens: int, hosts: int) -> int:
    from apb_ds.config import APBConfig
    from apb_ds.plan import plan_request

    return plan_request(APBConfig(hosts=hosts), num_tokens, 0).anchor_length
