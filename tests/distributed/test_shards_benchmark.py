"""benchmarks/shards.py: both ways to hold weights are measured, and give the same answer."""

from __future__ import annotations

import json
from pathlib import Path

from tests.pool import Pools


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
