"""Requests that hypothesis makes up, good ones and bad ones, and what the engine must say to each.

By default few are made, always the same ones; ``APB_DS_GENERATED=many`` makes a thousand, others each time.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from apb_ds.compressors.base import compressor_names, needs_heads
from tests.engine_cases import TOLERANCE, engine_random_scores
from tests.models import VOCAB_SIZE, distinct_ids
from tests.reference import exact_logits, resolve_settings, run_reference
from tests.reference_scores import SCORERS, ScoreInput

_CHECKS = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile(
    "few", max_examples=40, derandomize=True, deadline=None, database=None, suppress_health_check=_CHECKS
)
settings.register_profile("many", max_examples=1000, deadline=None, suppress_health_check=_CHECKS)
settings.load_profile(os.environ.get("APB_DS_GENERATED", "few"))

MAX_TOKENS, MAX_QUERY, MAX_HOSTS = 300, 24, 16
# Scores that are closer than this part of the largest may be ordered either way by rounding.
NEAR = 1e-4
UNTRAINED = [name for name in compressor_names() if not needs_heads(name)]
STAR = {"anchor_length": "block", "passing_length": 0, "query_in_anchor": False}


@dataclass(frozen=True)
class Request:
    """One request.

    Attributes
    ----------
    n, q : tokens of document and query
    num_kinds : how many different token ids the document has, VOCAB_SIZE for no repetition
    odd_ids : put in front of the query; may be none that the model knows
    embed : whether prefill is given the query
    given : ``APBConfig`` fields
    """

    n: int
    q: int
    num_kinds: int = VOCAB_SIZE
    odd_ids: tuple[int, ...] = ()
    embed: bool = True
    given: dict[str, Any] = field(default_factory=dict)

    def ids(self) -> tuple[Tensor, Tensor]:
        ids = distinct_ids(self.n + self.q)
        document, query = ids[:, : self.n] % self.num_kinds, ids[:, self.n :]
        return document, torch.cat([torch.tensor([self.odd_ids], dtype=torch.int64), query], dim=1)

    def reference_settings(self) -> dict[str, Any]:
        """The settings as keywords of the reference, which knows nothing of what must not matter."""
        ignored = ("schedule", "hosts_per_round", "shard_anchor", "method", "kernel")
        values = {name: value for name, value in self.given.items() if name not in ignored and value is not None}
        return {**values, **STAR} if self.given.get("method") == "star" else values


def _maybe(*values: Any) -> st.SearchStrategy[Any]:
    return st.sampled_from([None, *values])


_LENGTHS = st.one_of(st.none(), st.integers(0, 40), st.integers(-1, 400))
_SETTINGS = st.fixed_dictionaries(
    {"compressor": st.sampled_from(UNTRAINED), "hosts": st.integers(1, MAX_HOSTS)},
    optional={
        "anchor_length": st.one_of(_LENGTHS, st.just("block")),
        "passing_length": _LENGTHS,
        "compression_ratio": st.one_of(st.none(), st.floats(1, 16), st.sampled_from([0.5, 0, math.nan, math.inf])),
        "query_in_anchor": st.booleans(),
        "query_position": st.integers(0, 40),
        "schedule": _maybe("zigzag", "natural", "zigzak"),
        "hosts_per_round": _maybe(2, 3, 8),
        "shard_anchor": st.booleans(),
        "seed": st.integers(0, 2**63 - 1),
    },
)
# Most settings are good: of bad ones, one is as good as a hundred.
_MOSTLY_GOOD = st.one_of(
    _SETTINGS,
    _SETTINGS.map(lambda values: {**values, "compression_ratio": None, "schedule": None}),
    st.fixed_dictionaries(
        {
            "compressor": st.sampled_from(UNTRAINED),
            "hosts": st.sampled_from([1, 2, 4, 8, 16]),
            "passing_length": st.integers(0, 12),
        },
        optional={
            "anchor_length": st.integers(0, 16),
            "query_position": st.integers(0, 3),
            "hosts_per_round": st.integers(1, 8),
        },
    ),
    st.just({"method": "star", "hosts": 4}),
)
_TOKENS = st.one_of(st.integers(1, 40), st.integers(1, MAX_TOKENS))


def requests(max_tokens: int = MAX_TOKENS) -> st.SearchStrategy[Request]:
    """Return a strategy of requests of at most so many document tokens."""
    return st.builds(
        Request,
        n=_TOKENS.map(lambda n: min(n, max_tokens)),
        q=st.integers(1, MAX_QUERY),
        num_kinds=st.sampled_from([VOCAB_SIZE, VOCAB_SIZE, VOCAB_SIZE, 1, 2, 7, 100]),
        odd_ids=st.one_of(st.just(()), st.just(()), st.tuples(st.sampled_from([0, VOCAB_SIZE, -1, 2**40]))),
        embed=st.booleans() | st.just(True),
        given=_MOSTLY_GOOD,
    )


def answer(engine: Any, request: Request) -> Tensor:
    """Return the engine's logits of the query."""
    import apb_ds

    engine.configure(apb_ds.APBConfig(**request.given))
    document, query = request.ids()
    context = engine.prefill(document, query if request.embed else None)
    return engine.query_logits(query, context=context)


class _Scorer:
    """A compressor's scores by the reference; says whether rounding could change what is kept."""

    def __init__(self, request: Request, settings: Any) -> None:
        self.request = request
        self.settings = settings
        self.is_close = False

    def __call__(self, block: ScoreInput) -> Tensor:
        name = self.settings.compressor
        scores = engine_random_scores(block) if name == "random" else SCORERS[name](block)
        eligible = torch.tensor([self.settings.is_eligible(position) for position in block.positions.tolist()])
        candidates, count = scores[:, eligible], self.settings.passing_length
        if name not in ("recent", "random") and 0 < count < candidates.shape[1]:
            ordered = candidates.sort(dim=-1, descending=True).values
            gaps = ordered[:, count - 1] - ordered[:, count]
            # A pooled score is that of a neighbour, and so tied with it whatever the rounding.
            tied = (gaps == 0) & (name in ("window", "query") and self.request.num_kinds == VOCAB_SIZE)
            near = (gaps <= NEAR * ordered.abs().amax(dim=-1)) & ~tied
            self.is_close |= bool(near.any() | ordered.isnan().any())
        return scores


def check_against_reference(judge: Any, request: Request, logits: Tensor) -> str:
    """Compare the engine's logits with the reference's; return how: ``exact``, ``same``, or ``close`` to a tie."""
    document, query = request.ids()
    assert logits.shape == (1, query.shape[1], VOCAB_SIZE) and logits.dtype == torch.float32
    assert bool(logits.isfinite().all())
    settings = resolve_settings(
        document.shape[1], query.shape[1] if request.embed else None, **request.reference_settings()
    )
    if settings.exact:
        expected = exact_logits(judge, torch.cat([document, query], dim=1))[:, -query.shape[1] :]
        assert float((logits - expected).abs().max()) < TOLERANCE
        return "exact"
    scorer = _Scorer(request, settings)
    run = run_reference(judge, document, query, embed=request.embed, scorer=scorer, **request.reference_settings())
    if scorer.is_close:
        return "close"
    assert float((logits - run.logits).abs().max()) < TOLERANCE
    return "same"
