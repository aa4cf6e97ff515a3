"""Requests that come and go in one batch, as hypothesis makes them up, and a judge that knows nothing of batches.

The method is exact, so every answer is the plain model's: one forward of transformers over prompt and answer, without a
cache, tells which tokens had to come and what their logits were.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from tests.engine_cases import TOLERANCE
from tests.models import distinct_ids, qwen2_mixed
from tests.reference import exact_logits

# Rotary frequencies depend on how far a request reaches, and two of three layers attend within a window.
ROPE = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
EXACT: dict[str, Any] = {"method": "ring"}
# Lengths of the first contexts' documents, and how many positions they serve.
DOCUMENTS = [(41, 90), (23, 130), (30, 64)]
TEMPERATURE = 1.5
SMALL_SIZES = {
    "apb_ds.suffixes.PAGE_TOKENS": 4,
    "apb_ds.suffixes.SMALLEST_SLOT": 8,
    "apb_ds.engine.packs.QUERY_FORWARD_TOKENS": 16,
    "apb_ds.engine.batch.SHORT_DOCUMENT_TOKENS": 12,
}


class WrongAnswer(AssertionError):
    """An answer is not the plain model's."""


def schedule_model() -> Any:
    return qwen2_mixed(rope_parameters=ROPE, max_position_embeddings=32)


@contextmanager
def small_sizes() -> Iterator[pytest.MonkeyPatch]:
    """Let slots overflow, ranks take turns and queries fill a forward within a few tokens."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL_SIZES.items():
            patch.setattr(name, value)
        yield patch


class Keeps(LogitsProcessor):
    """Keeps the logits that it is given."""

    def __init__(self) -> None:
        self.logits: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.logits.append(scores.clone())
        return scores


@dataclass(eq=False)
class Asked:
    """A request, and what it must be answered from."""

    handle: Any
    source: Any
    prompt: Tensor
    reach: int
    num_new: int
    seed: int | None
    append: bool
    end_tokens: list[int]
    kept: Keeps | None
    is_cancelled: bool = False
    is_settled: bool = False
    may_be_outdated: bool = False

    def check(self, judge: Any) -> None:
        """Raise `WrongAnswer` unless every token is the one that the plain model has for it."""
        answer = self.handle.tokens
        if self.handle.error is None:
            is_whole = len(answer) == self.num_new or (answer and answer[-1] in self.end_tokens)
            _require(is_whole, f"ended after {len(answer)} of {self.num_new}: {answer}")
        _require(len(answer) <= self.num_new, f"{len(answer)} tokens")
        _require(not set(answer[:-1]) & set(self.end_tokens), "went on after an end token")
        if not answer:
            return
        ids = torch.cat([self.prompt, torch.tensor([answer[:-1]], dtype=torch.int64)], dim=1)
        logits = exact_logits(judge, ids, self.reach)[0, -len(answer) :]
        _require(answer == _chosen(logits, self.seed), f"{answer} after {self.prompt.shape[1]} tokens")
        if self.kept is not None and self.kept.logits:
            difference = float((torch.cat(self.kept.logits)[: len(answer)] - logits).abs().max())
            _require(difference < TOLERANCE, f"logits differ by {difference:.1e}")


def _chosen(logits: Tensor, seed: int | None) -> list[int]:
    if seed is None:
        return logits.argmax(dim=-1).tolist()
    generator = torch.Generator().manual_seed(seed)
    rows = (logits / TEMPERATURE).softmax(dim=-1).split(1)
    return [int(torch.multinomial(row, 1, generator=generator)) for row in rows]


def _require(is_right: object, message: str) -> None:
    if not is_right:
        raise WrongAnswer(message)


Action = tuple[Any, ...]
_WHICH = st.integers(0, 11)
_QUERY = st.integers(1, 7) | st.integers(1, 20)
_HOW = st.sampled_from(["greedy", "kept", "sampled", "ends"])
_ASK = st.tuples(st.just("ask"), _WHICH, _QUERY, st.integers(1, 12), _HOW)
_APPEND = st.tuples(st.just("append"), _WHICH, _QUERY, st.integers(1, 8), _HOW)
_STEPS = st.tuples(st.just("steps"), st.integers(1, 10))
_OTHER = st.one_of(
    st.tuples(st.just("cancel"), _WHICH),
    st.tuples(st.just("branch"), _WHICH),
    st.tuples(st.just("free"), _WHICH),
    st.tuples(st.just("turn"), _WHICH, _QUERY, st.integers(1, 5)),
    st.tuples(st.just("prefill"), st.integers(1, 40)),
    st.tuples(st.just("document"), st.integers(1, 24), _QUERY, st.integers(1, 6)),
    st.tuples(st.just("logits"), _WHICH, _QUERY),
)
_ROUND = st.tuples(st.lists(st.one_of(_ASK, _APPEND), min_size=1, max_size=4), st.lists(_OTHER, max_size=2), _STEPS)
schedules = st.lists(_ROUND.map(lambda parts: [*parts[0], *parts[1], parts[2]]), min_size=2, max_size=6).map(
    lambda rounds: [("branch", 0), ("branch", 1), *(action for actions in rounds for action in actions)]
)


@dataclass
class Scene:
    """One batch, its contexts and branches, and everything that was asked."""

    engine: Any
    batch: Any
    judge: Any
    contexts: list[Any]
    branches: list[Any] = field(default_factory=list)
    asked: list[Asked] = field(default_factory=list)
    known: dict[int, Tensor] = field(default_factory=dict)  # by id of context or branch: what it holds
    ended: list[Any] = field(default_factory=list)
    _numbers: int = 100

    def play(self, actions: list[Action]) -> None:
        for name, *arguments in actions:
            getattr(self, name)(*arguments)
            self._settle()
        while len(self.batch):
            self.steps(1)
            self._settle()
        self.steps(1)  # tells what ended in a prefill
        assert len(self.ended) == len(set(map(id, self.ended))) == len(self.asked), "each ends once"

    def _draw(self, length: int) -> Tensor:
        self._numbers += 1
        return distinct_ids(length, self._numbers)

    def ask(self, which: int, length: int, num_new: int, how: str) -> None:
        sources = [*self.contexts, *self.branches]
        self._ask(sources[which % len(sources)], length, num_new, how, append=False)

    def append(self, which: int, length: int, num_new: int, how: str) -> None:
        """Ask for a turn that a branch keeps."""
        self._ask(self.branches[which % len(self.branches)], length, num_new, how, append=True)

    def _ask(self, source: Any, length: int, num_new: int, how: str, append: bool) -> None:
        query, known = self._draw(length), self.known[id(source)]
        fits = known.shape[1] + length + num_new <= source.max_positions
        is_busy = append and any(one.append and one.source is source and not one.handle.is_done for one in self.asked)
        try:
            self._submit(query, known, source.max_positions, num_new, how, source, append, context=source)
        except ValueError:
            assert not fits or is_busy
        else:
            assert fits and not is_busy

    def document(self, length: int, num_query: int, num_new: int) -> None:
        document, query = self._draw(length), self._draw(num_query)
        reach = length + num_query + num_new
        self._submit(query, document, reach, num_new, "kept", None, False, document_ids=document)

    def _submit(
        self,
        query: Tensor,
        known: Tensor,
        reach: int,
        num_new: int,
        how: str,
        source: Any,
        append: bool,
        **given: Any,
    ) -> None:
        seed = self._numbers if how == "sampled" else None
        kept = None if how == "greedy" or (how == "ends" and num_new % 2) else Keeps()
        options: dict[str, Any] = {"do_sample": seed is not None, "seed": seed}
        if seed is not None:
            options |= {"temperature": TEMPERATURE, "top_k": 0, "top_p": 1.0}
        if kept is not None:
            options["logits_processor"] = LogitsProcessorList([kept])
        prompt = torch.cat([known, query], dim=1)
        end_tokens: list[int] = []
        if how == "ends":
            end_tokens = [self._third_token(prompt, reach)]
            options["eos_token_id"] = end_tokens
        handle = self.batch.submit(query, max_new_tokens=num_new, append=append, **options, **given)
        self.asked.append(Asked(handle, source, prompt, reach, num_new, seed, append, end_tokens, kept))

    def _third_token(self, ids: Tensor, reach: int) -> int:
        for _ in range(3):
            ids = torch.cat([ids, exact_logits(self.judge, ids, reach)[:, -1:].argmax(dim=-1)], dim=1)
        return int(ids[0, -1])

    def steps(self, number: int) -> None:
        for _ in range(number):
            self.ended += self.batch.step()

    def _settle(self) -> None:
        """Note the turns that branches have kept."""
        for one in self.asked:
            if one.append and not one.is_settled and one.handle.is_done and one.handle.error is None:
                one.is_settled = True
                for other in self.asked:
                    other.may_be_outdated |= other.source is one.source and not other.handle.tokens
                answer = torch.tensor([one.handle.tokens], dtype=torch.int64)
                self.known[id(one.source)] = torch.cat([one.prompt, answer], dim=1)
                assert torch.equal(one.source.token_ids, self.known[id(one.source)])

    def cancel(self, which: int) -> None:
        if self.asked:
            one = self.asked[which % len(self.asked)]
            one.is_cancelled |= not one.handle.is_done
            one.handle.cancel()

    def branch(self, which: int) -> None:
        context = self.contexts[which % len(self.contexts)]
        self.branches.append(context.branch())
        self.known[id(self.branches[-1])] = self.known[id(context)]

    def free(self, which: int) -> None:
        if self.branches:
            place = which % len(self.branches)
            branch = self.branches[place]
            if not any(one.source is branch and not one.handle.is_done for one in self.asked):
                branch.free()
                self.branches[place] = branch.context.branch()
                self.known[id(self.branches[place])] = self.known[id(branch.context)]

    def turn(self, which: int, length: int, num_new: int) -> None:
        """A turn that the engine alone appends to a context, while sequences and branches of it are under way."""
        context = self.contexts[which % len(self.contexts)]
        known, query = self.known[id(context)], self._draw(length)
        if known.shape[1] + length + num_new > context.max_positions:
            return
        if any(one.source is context and not one.handle.tokens and not one.handle.is_done for one in self.asked):
            return
        answer = self.engine.generate(query_ids=query, context=context, max_new_tokens=num_new, append=True)
        self.known[id(context)] = torch.cat([known, query, answer], dim=1)

    def prefill(self, length: int) -> None:
        document = self._draw(length)
        context = self.batch.prefill(document, max_positions=length + 60)
        self.contexts.append(context)
        self.known[id(context)] = document

    def logits(self, which: int, length: int) -> None:
        """The logits of a context and of a branch together."""
        sources = [of_kind[which % len(of_kind)] for of_kind in (self.contexts, self.branches)]
        queries = [self._draw(length), self._draw(2)]
        pairs = [(source, self.known[id(source)], query) for source, query in zip(sources, queries, strict=True)]
        if any(known.shape[1] + query.shape[1] > source.max_positions for source, known, query in pairs):
            return
        found = self.engine.query_logits(queries, context=sources)
        for (source, known, query), logits in zip(pairs, found, strict=True):
            expected = exact_logits(self.judge, torch.cat([known, query], dim=1), source.max_positions)
            difference = float((logits - expected[:, -query.shape[1] :]).abs().max())
            _require(difference < TOLERANCE, f"query's logits differ by {difference:.1e}")

    def check(self) -> None:
        from apb_ds.engine.sequences import Cancelled

        for one in self.asked:
            error = one.handle.error
            if isinstance(error, ValueError):
                assert one.may_be_outdated and "changed" in str(error), error
            elif error is not None:
                assert one.is_cancelled and isinstance(error, Cancelled), error
            one.check(self.judge)


def play(engine: Any, judge: Any, actions: list[Action], max_sequences: int = 5, *, copies: bool = False) -> Scene:
    """Play a schedule in a batch of its own and check every answer; return what was asked.

    Parameters
    ----------
    copies : whether documents that nobody shares are copied, as where steps are recorded
    """
    contexts = [engine.prefill(distinct_ids(length, seed), max_positions=reach) for seed, (length, reach) in _first()]
    with engine.batch(max_sequences, step_every_s=0.0) as batch:
        batch._max_copied = 30 if copies else 0
        scene = Scene(engine, batch, judge, contexts)
        scene.known = {id(context): context.token_ids for context in contexts}
        scene.play(actions)
    scene.check()
    return scene


def _first() -> Iterator[tuple[int, tuple[int, int]]]:
    return enumerate(DOCUMENTS)


# One of each: joins at different steps, several documents, long and short queries, turns, ends, and a cancelled one.
FULL_SCHEDULE: list[Action] = [
    ("branch", 0),
    ("branch", 1),
    ("ask", 0, 5, 9, "kept"),
    ("ask", 1, 1, 12, "sampled"),
    ("steps", 2),
    ("append", 0, 4, 8, "kept"),
    ("append", 1, 9, 6, "kept"),
    ("ask", 0, 18, 10, "greedy"),
    ("document", 7, 3, 5),
    ("steps", 3),
    ("turn", 0, 3, 4),
    ("prefill", 33),
    ("turn", 0, 4, 4),
    ("document", 20, 2, 4),
    ("steps", 8),
    ("branch", 0),
    ("append", 0, 2, 7, "sampled"),
    ("ask", 5, 3, 5, "ends"),
    ("append", 2, 1, 6, "kept"),
    ("logits", 0, 4),
    ("steps", 2),
    ("ask", 2, 2, 10, "ends"),
    ("ask", 1, 2, 9, "sampled"),
    ("cancel", 9),
    ("ask", 1, 3, 4, "kept"),
    ("cancel", -1),  # before it joins
    ("steps", 9),
    ("append", 0, 6, 5, "kept"),
    ("ask", 4, 1, 8, "kept"),
    ("ask", 2, 4, 6, "kept"),
    ("logits", 1, 3),
]
