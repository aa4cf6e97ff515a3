"""Compressors: scores against plain Python, head by head, and the tokens that they keep."""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import apb_ds
from apb_ds.attention import APBAttention
from apb_ds.compressors import (
    BlockStates,
    Compressor,
    base,
    build_compressor,
    compressor_names,
    register_compressor,
)
from apb_ds.compressors.window import WindowCompressor
from apb_ds.config import COMPRESSORS, APBConfig
from apb_ds.ops.selection import select_top
from tests.models import build_model, request_ids

HEAD_DIM = 8
SCALE = 0.5
Vector = list[float]


def new_block(
    tokens: int, heads: int = 6, kv_heads: int = 2, *, start: int = 100, layer_idx: int = 0, num_query: int = 0
) -> BlockStates:
    generator = torch.Generator().manual_seed(tokens)

    def draw(heads: int, tokens: int) -> Tensor:
        return torch.randn(1, heads, tokens, HEAD_DIM, generator=generator)

    return BlockStates(
        queries=draw(heads, tokens),
        keys=draw(kv_heads, tokens),
        values=draw(kv_heads, tokens),
        start=start,
        layer_idx=layer_idx,
        scale=SCALE,
        anchor_queries=draw(heads, num_query) if num_query else None,
    )


def build(name: str, **given: Any) -> Compressor:
    return build_compressor(APBConfig(compressor=name, **given).settings)  # type: ignore[arg-type]


# --- the scores of design.md, in Python floats ---------------------------------------------------------------------


def dot(left: Vector, right: Vector) -> float:
    return math.fsum(a * b for a, b in zip(left, right, strict=True))


def norm(vector: Vector) -> float:
    return math.sqrt(dot(vector, vector))


def softmax(logits: Vector) -> Vector:
    top = max(logits)
    weights = [math.exp(logit - top) for logit in logits]
    return [weight / math.fsum(weights) for weight in weights]


def pooled(scores: Vector) -> Vector:
    """Return the maximum of each score and its two neighbours on either side, within the block."""
    return [max(scores[max(0, token - 2) : token + 3]) for token in range(len(scores))]


def by_knorm(block: BlockStates, kv_head: int) -> Vector:
    return [-norm(key) for key in block.keys[0, kv_head].tolist()]


def by_keydiff(block: BlockStates, kv_head: int) -> Vector:
    keys = block.keys[0, kv_head].tolist()
    directions = [[entry / norm(key) for entry in key] for key in keys]
    mean = [math.fsum(entries) / len(keys) for entries in zip(*directions, strict=True)]
    return [-dot(key, mean) / (norm(key) * norm(mean)) for key in keys]


def heads_of_group(block: BlockStates, kv_head: int) -> range:
    group = block.queries.shape[1] // block.kv_heads
    return range(kv_head * group, (kv_head + 1) * group)


def by_window(block: BlockStates, kv_head: int) -> Vector:
    keys = block.keys[0, kv_head].tolist()
    observers = range(max(0, len(keys) - 32), len(keys))
    total = [0.0] * len(keys)
    for head in heads_of_group(block, kv_head):
        for observer in observers:
            query = block.queries[0, head, observer].tolist()
            for token, weight in enumerate(softmax([SCALE * dot(query, key) for key in keys[: observer + 1]])):
                total[token] += weight
    count = len(observers) * len(heads_of_group(block, kv_head))
    return pooled([entry / count for entry in total])


def by_query(block: BlockStates, kv_head: int) -> Vector:
    assert block.anchor_queries is not None
    keys = block.keys[0, kv_head].tolist()
    best = [0.0] * len(keys)
    for head in heads_of_group(block, kv_head):
        rows = [softmax([SCALE * dot(query, key) for key in keys]) for query in block.anchor_queries[0, head].tolist()]
        means = [math.fsum(column) / len(rows) for column in zip(*rows, strict=True)]
        best = [max(pair) for pair in zip(best, means, strict=True)]
    return pooled(best)


PLAIN = {"knorm": by_knorm, "keydiff": by_keydiff, "window": by_window, "query": by_query}


@pytest.mark.parametrize("heads, kv_heads", [(6, 2), (3, 3), (4, 1)])
@pytest.mark.parametrize("tokens", [1, 2, 5, 31, 32, 33, 45])
@pytest.mark.parametrize("name", PLAIN)
def test_scores(name: str, tokens: int, heads: int, kv_heads: int) -> None:
    block = new_block(tokens, heads, kv_heads, num_query=3)
    scores = build(name).score(block)
    assert scores.shape == (kv_heads, tokens) and scores.dtype == torch.float32
    expected = torch.tensor([PLAIN[name](block, kv_head) for kv_head in range(kv_heads)])
    # float32 sums of at most 45 terms of size 1 to 5.
    torch.testing.assert_close(scores, expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("name", ["knorm", "keydiff", "window", "query"])
def test_scores_of_half_precision_are_computed_in_float32(name: str) -> None:
    block = new_block(40, num_query=3)
    assert block.anchor_queries is not None
    states = (block.queries, block.keys, block.values, block.anchor_queries)
    halves = [tensor.bfloat16() for tensor in states]
    half, again = (
        BlockStates(*tensors[:3], start=100, layer_idx=0, scale=SCALE, anchor_queries=tensors[3])
        for tensors in (halves, [tensor.float() for tensor in halves])
    )
    compressor = build(name)
    assert torch.equal(compressor.score(half), compressor.score(again))


@pytest.mark.parametrize("rows", [1, 2, 5, 7, 12, 100])
@pytest.mark.parametrize("name", ["window", "query"])
def test_scores_in_pieces(name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of one query, of several, of all queries of one KV head, and of two of its three KV heads."""
    block = new_block(50, heads=6, kv_heads=3, num_query=6)
    compressor = WindowCompressor(window=6) if name == "window" else build(name)
    whole = compressor.score(block)
    monkeypatch.setattr(base, "MAX_LOGITS", rows * 2 * 50)
    pieces = compressor.score(block)
    torch.testing.assert_close(pieces, whole, rtol=1e-6, atol=0)  # rounding of sums of at most 12 terms in float32
    assert torch.equal(select_top(pieces, 10), select_top(whole, 10))


class PeakMemory(TorchDispatchMode):
    """Counts the bytes that operations take, of the tensors that exist at the same time, besides those given."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.given = {tensor.untyped_storage()._cdata for tensor in given}
        self.existing: weakref.WeakSet[Tensor] = weakref.WeakSet()
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), keywords: Any = None) -> Any:
        made = function(*arguments, **(keywords or {}))
        self.existing.update(part for part in tree_leaves(made) if isinstance(part, Tensor))
        storages = {storage._cdata: storage.nbytes() for storage in map(Tensor.untyped_storage, self.existing)}
        self.peak = max(self.peak, sum(size for place, size in storages.items() if place not in self.given))
        return made


@pytest.mark.parametrize(
    "name, heads, kv_heads, num_query", [("query", 32, 8, 2048), ("query", 64, 1, 1024), ("window", 64, 8, 1)]
)
def test_memory_of_a_long_query_over_a_long_block(name: str, heads: int, kv_heads: int, num_query: int) -> None:
    tokens = 131_072
    queries, states, asked = (
        torch.empty(1, *sizes, 128, dtype=torch.bfloat16, device="meta")
        for sizes in ((heads, tokens), (kv_heads, tokens), (heads, num_query))
    )
    block = BlockStates(queries, states, states, start=0, layer_idx=0, scale=SCALE, anchor_queries=asked)
    with PeakMemory(queries, states, asked) as memory:
        build(name).score(block)
    # Two arrays of logits, float32 copies of the keys (on CPU), and the result with two pieces of it. All logits of one
    # KV head would take 4 or 32 GiB for the query, and those of the window 1 GiB.
    logits, keys, result = base.MAX_LOGITS, states.numel(), heads * tokens
    assert memory.peak < 4 * (2 * logits + keys + 3 * result) + 2**20


def test_recent_is_the_position() -> None:
    scores = build("recent").score(new_block(40))
    assert scores.dtype == torch.float32 and scores.shape == (2, 40)
    assert bool((scores.diff(dim=1) > 0).all())
    keys, _ = compress(build("recent"), new_block(40), 5, 40)
    assert torch.equal(keys, new_block(40).keys[:, :, 35:])


# --- random ---------------------------------------------------------------------------------------------------------


def random_scores(start: int, tokens: int, *, seed: int = 0, layer_idx: int = 0, kv_heads: int = 3) -> Tensor:
    states = torch.zeros(1, kv_heads, tokens, 1)
    block = BlockStates(states, states, states, start=start, layer_idx=layer_idx, scale=1.0)
    return build("random", seed=seed).score(block)


def test_random_depends_on_the_position_only() -> None:
    whole = random_scores(0, 3000)
    assert whole.dtype == torch.float32 and whole.shape == (3, 3000)
    for start, stop in [(2000, 3000), (0, 7), (7, 8), (1234, 1999)]:  # any split, in any order
        assert torch.equal(random_scores(start, stop - start), whole[:, start:stop])
    torch.manual_seed(5)
    torch.rand(3)
    assert torch.equal(random_scores(0, 3000), whole), "no random generator takes part"
    assert torch.equal(random_scores(0, 3000, kv_heads=1), whole[:1])


def test_random_differs_by_seed_layer_and_head() -> None:
    drawn = torch.cat(
        [random_scores(0, 3000, seed=seed, layer_idx=layer) for seed in (0, 1, 2**31) for layer in (0, 1)]
    )
    # 18 rows of 3000 independent draws: correlations have a standard deviation of 0.018; allow five of them.
    assert float((drawn.corrcoef() - torch.eye(18)).abs().max()) < 0.09
    assert not torch.equal(random_scores(0, 100, seed=3, layer_idx=4), random_scores(0, 100, seed=4, layer_idx=3))


def test_random_is_uniform_far_into_a_document() -> None:
    for start in (0, 500_000):
        scores = random_scores(start, 10_000)
        assert float(scores.min()) >= 0 and float(scores.max()) < 1
        for row in scores:
            counts = torch.histc(row, bins=10, min=0, max=1)  # 1000 each, plus or minus 30
            assert float((counts - 1000).abs().max()) < 150


def test_random_rarely_ties() -> None:
    assert random_scores(0, 2000)[0].unique().numel() > 1990


# --- kept tokens ----------------------------------------------------------------------------------------------------


def compress(compressor: Compressor, block: BlockStates, count: int, num_eligible: int) -> tuple[Tensor, Tensor]:
    """Return the keys and values that a compressor keeps, (1, kv_heads, count, head_dim) each."""
    into = torch.full((2, block.kv_heads, count, block.keys.shape[3]), torch.nan)
    compressor.compress(block, count, num_eligible, into)
    return into[0:1], into[1:2]


class FromTable(Compressor):
    """Scores that a test sets."""

    name = "from_table"

    def __init__(self, scores: list[list[float]]) -> None:
        self.scores = torch.tensor(scores)

    def score(self, block: BlockStates) -> Tensor:
        return self.scores


def kept_by(scores: list[list[float]], count: int, num_eligible: int) -> list[list[int]]:
    """Return which tokens each KV head keeps; keys and values hold their positions."""
    tokens = len(scores[0])
    keys = torch.arange(tokens, dtype=torch.float32).reshape(1, 1, tokens, 1).repeat(1, len(scores), 1, 2)
    block = BlockStates(keys, keys, -keys, start=0, layer_idx=0, scale=1.0)
    kept_keys, kept_values = compress(FromTable(scores), block, count, num_eligible)
    assert kept_keys.shape == kept_values.shape == (1, len(scores), count, 2)
    assert torch.equal(kept_keys, -kept_values)
    return kept_keys[0, :, :, 0].int().tolist()


NAN = math.nan


@pytest.mark.parametrize(
    "scores, count, num_eligible, kept",
    [
        ([[1, 5, 2, 4], [4, 3, 2, 1]], 2, 4, [[1, 3], [0, 1]]),
        ([[9, 5, 2, 4], [4, 3, 2, 1]], 2, 3, [[1, 3], [1, 2]]),  # token 0 is in the anchor
        ([[9, 8, 2, 4]], 1, 2, [[3]]),
        ([[9, 8, 2, 4]], 2, 2, [[2, 3]]),
        ([[9, 8, 2, 4]], 0, 3, [[]]),
        ([[9, 8, 2, 4]], 0, 0, [[]]),
        ([[1, 1, 1, 1]], 2, 4, [[0, 1]]),
        ([[1, 1, 1, 1]], 2, 3, [[1, 2]]),
        ([[NAN, 1, NAN, 0]], 2, 4, [[1, 3]]),
        ([[NAN, NAN, 3, NAN]], 1, 4, [[2]]),
        ([[NAN, -1e38, NAN, math.inf]], 2, 4, [[1, 3]]),
        ([[NAN, NAN, NAN, 7]], 2, 4, [[0, 3]]),  # fewer numbers than tokens to keep
    ],
)
def test_kept_tokens(scores: list[list[float]], count: int, num_eligible: int, kept: list[list[int]]) -> None:
    assert kept_by(scores, count, num_eligible) == kept


def test_statistics_run_over_the_whole_block() -> None:
    """Tokens that are not eligible still count in the mean direction and in the softmax."""
    block = new_block(40)
    eligible = BlockStates(
        block.queries[:, :, 25:], block.keys[:, :, 25:], block.values[:, :, 25:], start=125, layer_idx=0, scale=SCALE
    )
    for name in ("keydiff", "window"):
        compressor = build(name)
        scores = compressor.score(block)
        best = (scores[:, 25:].sort(dim=1, descending=True, stable=True).indices[:, :4] + 25).sort(dim=1).values
        keys, values = compress(compressor, block, 4, 15)
        for kv_head in range(2):
            assert torch.equal(keys[0, kv_head], block.keys[0, kv_head, best[kv_head]])
            assert torch.equal(values[0, kv_head], block.values[0, kv_head, best[kv_head]])
        assert not torch.allclose(compressor.score(eligible), scores[:, 25:])


# --- the registry ---------------------------------------------------------------------------------------------------


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """A copy of the registry, which drops a test's compressor afterwards."""
    copy, names = dict(base._REGISTRY), list(COMPRESSORS)
    monkeypatch.setattr(base, "_REGISTRY", copy)
    yield copy
    COMPRESSORS[:] = names


def test_names() -> None:
    assert compressor_names() == tuple(COMPRESSORS), "what APBConfig checks, and what is registered"
    assert set(compressor_names()) >= {"knorm", "keydiff", "window", "query", "recent", "random", "retaining_heads"}
    assert list(compressor_names()) == sorted(compressor_names())
    assert APBConfig().resolved()["compressor"] in compressor_names()


def test_an_engine_runs_a_new_compressor_by_name(registry: dict[str, Any]) -> None:
    @register_compressor("earliest")
    class Earliest(Compressor):
        def score(self, block: BlockStates) -> Tensor:
            return -torch.arange(block.num_tokens, dtype=torch.float32).expand(block.kv_heads, -1)

    assert Earliest.name == "earliest" and "earliest" in compressor_names()
    given: dict[str, Any] = {"hosts": 4, "anchor_length": 8, "passing_length": 3}
    document, query = request_ids(90, 4)
    engine = apb_ds.init_inference(build_model("llama"), APBConfig(compressor="earliest", **given))
    logits = engine.query_logits(query, context=engine.prefill(document, query))
    engine.configure(APBConfig(compressor="recent", **given))
    others = engine.query_logits(query, context=engine.prefill(document, query))
    assert logits.isfinite().all() and float((logits - others).abs().max()) > 1e-3


def test_names_are_unique(registry: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="compressor='window' is already registered"):
        register_compressor("window")(FromTable)
    assert registry["window"].__name__ == "WindowCompressor" and FromTable.name == "from_table"


@pytest.mark.parametrize("make", [lambda name: build(name), lambda name: APBAttention(APBConfig(compressor=name))])
def test_an_unknown_name(make: Any) -> None:
    with pytest.raises(ValueError) as caught:
        make("windw")
    message = str(caught.value)
    assert "compressor='windw'" in message and "Did you mean 'window'?" in message
    assert all(name in message for name in compressor_names())


def test_retaining_heads_need_heads() -> None:
    with pytest.raises(ValueError, match="compressor='retaining_heads' needs trained heads"):
        build("retaining_heads").score(new_block(40))


@pytest.mark.parametrize("given", [{"query_in_anchor": False}, {"anchor_length": 0}, {"method": "star"}], ids=str)
def test_the_query_compressor_needs_the_query_in_the_anchor(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError) as caught:
        build("query", **given)
    assert "compressor='query'" in str(caught.value) and "query_in_anchor=true" in str(caught.value)


def test_settings_reach_the_compressor() -> None:
    assert build("random", seed=7) == build("random", seed=7) != build("random", seed=8)
