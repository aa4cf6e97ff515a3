"""What transformers prepares for a sequence, and the tokens that are chosen with it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from apb_ds.engine.choosing import Chooser, prepare
from tests.generation_parts import Recorder, StopAfter
from tests.models import VOCAB_SIZE, build_model, distinct_ids

PROMPT = distinct_ids(30)


@pytest.fixture(scope="module")
def model() -> Any:
    model = build_model("llama")
    model.generation_config.eos_token_id = [7, 9]
    return model


def _logits(seed: int = 0) -> torch.Tensor:
    return torch.randn(1, VOCAB_SIZE, generator=torch.Generator().manual_seed(seed)) * 2


def _names(parts: Any) -> list[str]:
    return [type(part).__name__ for part in parts]


SETTINGS: list[dict[str, Any]] = [
    {},
    {"max_time": 9.0, "min_new_tokens": 3, "eos_token_id": 5},
    {"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "repetition_penalty": 1.3},
    {"generation_config": GenerationConfig(no_repeat_ngram_size=2, bad_words_ids=[[3]])},
    {"logits_processor": LogitsProcessorList([lambda ids, scores: -scores])},
    {"stopping_criteria": StoppingCriteriaList([StopAfter(34)])},
]


@pytest.mark.parametrize("arguments", SETTINGS, ids=lambda arguments: ", ".join(arguments) or "none")
def test_processors_and_criteria_are_those_of_a_real_call(model: Any, arguments: dict[str, Any]) -> None:
    given: dict[str, Any] = {}

    def loop(model: Any, input_ids: Any, logits_processor: Any, stopping_criteria: Any, **_: Any) -> Any:
        given.update(processors=logits_processor, criteria=stopping_criteria)
        return input_ids

    model.generate(input_ids=PROMPT, max_new_tokens=6, custom_generate=loop, **arguments)
    chooser = prepare(model, PROMPT, 6, arguments)
    assert _names(chooser.processors) == _names(given["processors"])
    assert _names(chooser.criteria) == _names(given["criteria"])
    assert {"MaxLengthCriteria", "EosTokenCriteria"} <= set(_names(chooser.criteria))
    assert chooser.max_length == 36
    assert chooser.end_tokens == ({5} if "eos_token_id" in arguments else {7, 9})
    scores = _logits()
    assert torch.equal(chooser.processors(PROMPT, scores), given["processors"](PROMPT, scores))
    if not chooser.config.do_sample:
        assert int(chooser.choose(PROMPT, scores)) == int(given["processors"](PROMPT, scores).argmax())


def test_preparing_runs_nothing_and_may_be_done_in_any_thread(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "forward", lambda input_ids=None, attention_mask=None: pytest.fail("a forward ran"))
    before = (model.generation_config.to_dict(), model.config.to_dict(), torch.get_rng_state())
    streamer = Recorder()
    with ThreadPoolExecutor(4) as threads:
        futures = [
            threads.submit(prepare, model, PROMPT[:, : 10 + n], n, {"streamer": streamer}, seed=n) for n in range(1, 20)
        ]
        choosers = [future.result() for future in futures]
    assert [chooser.max_length for chooser in choosers] == [10 + 2 * n for n in range(1, 20)]
    assert all(chooser.is_plain and chooser.end_tokens == {7, 9} for chooser in choosers)
    assert streamer.events == [], "the chooser feeds it, not transformers"
    after = (model.generation_config.to_dict(), model.config.to_dict(), torch.get_rng_state())
    assert before[:2] == after[:2]
    assert torch.equal(before[2], after[2])


@pytest.mark.parametrize(
    ("arguments", "plain"),
    [
        ({}, True),
        ({"eos_token_id": 3, "streamer": Recorder()}, True),
        ({"temperature": 0.5, "do_sample": False}, True),
        ({"do_sample": True}, False),
        ({"repetition_penalty": 1.2}, False),
        ({"min_new_tokens": 2}, False),
        ({"max_time": 5.0}, False),
        ({"stopping_criteria": StoppingCriteriaList([StopAfter(34)])}, False),
        ({"stop_strings": "x", "tokenizer": object()}, False),
    ],
    ids=str,
)
def test_a_plain_chooser_is_an_argmax_up_to_an_end(model: Any, arguments: dict[str, Any], plain: bool) -> None:
    chooser = prepare(model, PROMPT, 4, arguments)
    assert chooser.is_plain == plain
    if not plain:
        return
    ids = PROMPT
    for step in range(4):
        token = chooser.choose(ids, _logits(step))
        assert token.tolist() == [[int(_logits(step).argmax())]]
        ids = torch.cat([ids, token], dim=-1)
        assert chooser.ends(ids) == (ids.shape[1] >= chooser.max_length or int(token) in chooser.end_tokens)
    for end in chooser.end_tokens:
        assert chooser.ends(torch.cat([PROMPT, torch.tensor([[end]])], dim=-1))
    assert not chooser.ends(torch.cat([PROMPT, torch.tensor([[11]])], dim=-1))


def _draw(chooser: Chooser, num: int = 12) -> list[int]:
    return [int(chooser.choose(PROMPT, _logits(step))) for step in range(num)]


def test_a_seed_draws_as_the_global_generator_would(model: Any) -> None:
    sampling = {"do_sample": True, "top_k": 20}
    drawn = []
    for seed in (0, 5, 2**64 - 1):
        torch.manual_seed(seed)
        expected = _draw(prepare(model, PROMPT, 4, sampling))
        torch.manual_seed(1)
        state = torch.get_rng_state()
        assert _draw(prepare(model, PROMPT, 4, sampling, seed=seed)) == expected
        assert torch.equal(torch.get_rng_state(), state)
        drawn.append(expected)
    assert drawn[0] != drawn[1] != drawn[2]


def test_sequences_draw_from_their_own_generators(model: Any) -> None:
    alone = [_draw(prepare(model, PROMPT, 4, {"do_sample": True}, seed=seed)) for seed in (1, 2)]
    choosers = [prepare(model, PROMPT, 4, {"do_sample": True}, seed=seed) for seed in (1, 2)]
    together = [[int(chooser.choose(PROMPT, _logits(step))) for chooser in choosers] for step in range(12)]
    assert [list(tokens) for tokens in zip(*together, strict=True)] == alone
    assert alone[0] != alone[1]


class SeesScores(StopAfter):
    """Keeps the scores that it is given."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.scores = scores
        return super().__call__(input_ids, scores)


def test_criteria_see_the_processed_scores(model: Any) -> None:
    criterion = SeesScores(99)
    halved = LogitsProcessorList([lambda ids, scores: scores / 2])
    arguments = {"logits_processor": halved, "stopping_criteria": StoppingCriteriaList([criterion])}
    chooser = prepare(model, PROMPT, 4, arguments)
    token = chooser.choose(PROMPT, _logits())
    chooser.ends(torch.cat([PROMPT, token], dim=-1))
    assert torch.equal(criterion.scores, _logits() / 2)
    chooser.ends(torch.cat([PROMPT, token], dim=-1), _logits(3))
    assert torch.equal(criterion.scores, _logits(3))


def test_the_streamer_gets_prompt_tokens_and_end(model: Any) -> None:
    streamer = Recorder()
    for told in (prepare(model, PROMPT, 4, {"streamer": streamer}), prepare(model, PROMPT, 4, {})):
        told.begin(PROMPT)
        told.tell(torch.tensor([[4]]))
        told.end()
    assert streamer.events == [PROMPT.tolist(), [4], "end"]
