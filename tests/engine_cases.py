"""Requests that the engine and the reference both answer, and how the engine's random hash reaches the reference."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
from torch import Tensor
from transformers.activations import ACT2FN

from tests.heads import random_checkpoint
from tests.models import build_model, request_ids
from tests.reference_scores import ScoreInput, Scorer, heads_and_window, retaining_heads

# Both sides compute in float32 and differ in the order of their sums: about 1e-5 on logits of size 10. A single token
# seen or missed moves them by more than ten times this (test_reference.py).
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    """One request: lengths in tokens, and the settings given (``APBConfig`` fields, also the reference's)."""

    name: str
    n: int
    q: int
    given: dict[str, Any] = field(default_factory=dict)

    def ids(self) -> tuple[Tensor, Tensor]:
        return request_ids(self.n, self.q)

    def reference_settings(self, family: str = "llama") -> dict[str, Any]:
        """The settings as keywords of `run_reference`, the engine's own hash in place of the reference's.

        `family` is the model's, for its heads (`tests.heads`).
        """
        settings = dict(self.given)
        if settings.get("compressor") == "random":
            settings["scorer"] = engine_random_scores
        if settings.get("compressor") in HEADS_SCORERS:
            settings["scorer"] = heads_scorer(family, settings["compressor"])
        return settings


def own_query_logits(engine: Any, query: Tensor, context: Any) -> Tensor:
    """`engine.query_logits` as this rank computed them: the first rank's do not replace them on the way out."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine.group, "broadcast", keep)
        logits = engine.query_logits(query, context=context)
    assert len(kept) == 1, "query_logits shares its result in some other way; have this function undo that one."
    return logits


HEADS_SCORERS = {"retaining_heads": retaining_heads, "heads_and_window": heads_and_window}


def heads_scorer(family: str, compressor: str = "retaining_heads") -> Scorer:
    """The slow scores of the heads that `tests.heads` draws for a model of the family."""
    model = build_model(family)
    activation = ACT2FN[getattr(model.config, "hidden_act", None) or model.config.hidden_activation]
    return HEADS_SCORERS[compressor](random_checkpoint(model), activation)


def engine_random_scores(block: ScoreInput) -> Tensor:
    """The package's hash: which one it is nobody specifies, only what it may depend on."""
    from apb_ds.compressors.base import BlockStates
    from apb_ds.compressors.random import RandomCompressor

    states = BlockStates(
        queries=block.queries.unsqueeze(0),
        keys=block.keys.unsqueeze(0),
        values=block.keys.unsqueeze(0),
        start=int(block.positions[0]),
        layer_idx=block.layer,
        scale=block.scaling,
    )
    return RandomCompressor(seed=block.seed).score(states)


def _case(name: str, n: int, q: int, **given: Any) -> Case:
    return Case(name, n, q, given)


CASES = [
    _case("defaults", 203, 7),
    _case("defaults, long query", 203, 24),
    _case("query after a header", 203, 7, query_position=5),
    _case("query in front", 203, 7, query_position=0),
    _case("lengths divide", 192, 8, hosts=4, anchor_length=16, passing_length=6),
    _case("one host short of two", 61, 3, hosts=2, anchor_length=12, passing_length=4),
    _case("one query token", 97, 1, hosts=4, anchor_length=9, passing_length=3),
    _case("anchor holds the query alone", 97, 6, hosts=4, anchor_length=7, passing_length=3),
    _case("anchor as long as a block", 98, 4, hosts=4, anchor_length=25, passing_length=3),
    _case("anchor: block", 98, 4, hosts=4, anchor_length="block", passing_length=3),
    _case("no query in the anchor", 98, 4, hosts=4, anchor_length=11, passing_length=5, query_in_anchor=False),
    _case("anchor of one token", 98, 4, hosts=4, anchor_length=1, passing_length=5, query_in_anchor=False),
    _case("no anchor", 98, 4, hosts=4, anchor_length=0, passing_length=5),
    _case("passing beyond the block", 98, 4, hosts=4, anchor_length=9, passing_length=60),
    _case("passing as long as the block", 98, 4, hosts=4, anchor_length=9, passing_length=25),
    _case("everything passed", 98, 4, hosts=4, anchor_length=0, passing_length=25),
    _case("nothing passed", 98, 4, hosts=4, anchor_length=9, passing_length=0),
    _case("nothing passed, no anchor", 98, 4, hosts=4, anchor_length=0, passing_length=0),
    _case("compression ratio", 98, 4, hosts=4, anchor_length=9, compression_ratio=2.5),
    _case("ratio of one", 98, 4, hosts=4, anchor_length=9, compression_ratio=1),
    _case("fewer tokens than hosts", 5, 3, hosts=8, anchor_length=0, passing_length=1),
    _case("one document token", 1, 2, hosts=4, anchor_length=0, passing_length=1),
    _case("single-token blocks", 8, 3, hosts=8, anchor_length=0, passing_length=1),
    _case("single-token blocks and anchor", 8, 3, hosts=8, anchor_length=1, passing_length=1, query_in_anchor=False),
    _case("empty blocks and anchor", 5, 3, hosts=8, anchor_length=1, passing_length=1, query_in_anchor=False),
    _case("blocks of one and two", 13, 2, hosts=8, anchor_length=1, passing_length=2, query_in_anchor=False),
    _case("exact, anchor beyond the block", 60, 9),
    _case("exact, one host", 60, 9, hosts=1, anchor_length=12),
    _case("exact, tiny", 3, 2),
    _case("knorm", 150, 5, hosts=4, anchor_length=12, passing_length=5, compressor="knorm"),
    _case("keydiff", 150, 5, hosts=4, anchor_length=12, passing_length=5, compressor="keydiff"),
    _case("window", 150, 5, hosts=4, anchor_length=12, passing_length=5, compressor="window"),
    _case("window, short blocks", 50, 5, hosts=4, anchor_length=8, passing_length=5, compressor="window"),
    _case("query", 150, 5, hosts=4, anchor_length=12, passing_length=5, compressor="query"),
    _case("query, after a header", 150, 5, hosts=4, query_position=4, compressor="query"),
    _case("recent", 150, 5, hosts=4, anchor_length=12, passing_length=5, compressor="recent"),
    _case("random", 150, 5, hosts=4, anchor_length=12, passing_length=5, compressor="random"),
    _case("heads", 150, 5, hosts=4, anchor_length=12, passing_length=5, compressor="retaining_heads"),
    _case("heads, no anchor", 98, 4, hosts=4, anchor_length=0, passing_length=5, compressor="retaining_heads"),
    _case("heads, everything passed", 98, 4, hosts=4, anchor_length=9, passing_length=25, compressor="retaining_heads"),
    _case("heads, exact", 60, 9, compressor="retaining_heads"),
    _case("heads and window", 150, 5, hosts=4, anchor_length=12, passing_length=5, compressor="heads_and_window"),
    _case(
        "heads and window, short blocks",
        50,
        5,
        hosts=4,
        anchor_length=8,
        passing_length=5,
        compressor="heads_and_window",
    ),
    _case("random, other seed", 150, 5, hosts=4, anchor_length=12, passing_length=5, compressor="random", seed=11),
]
