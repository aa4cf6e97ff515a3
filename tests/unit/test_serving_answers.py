"""Answers on the engine's side: tokens to text, stop texts, log-probabilities, and how tokens are chosen."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import TemperatureLogitsWarper, TopPLogitsWarper

from apb_ds.engine.choosing import Chooser, prepare
from apb_ds.engine.generation_settings import check_generate_arguments
from apb_ds.serving.answers import Answer, LogitBias, LogprobRecorder, Penalties
from apb_ds.serving.detokenizing import Detokenizer, find_special_ids, token_bytes
from apb_ds.serving.requests import Delta, Ended, Options, Prompt
from apb_ds.serving.responses import ChatResponse, CompletionResponse
from tests import models
from tests.tiny_checkpoint import byte_tokenizer
from tests.unit.smollm2 import smollm2_tokenizer
from tests.unit.test_stop_text import byte_fallback, sentencepiece

PROMPT = torch.tensor([[1, 2, 3, 4]])
NUM_NEW = 8
DEFAULT = Options()
PASSAGE = "The café's “menu”: naïve 日本語 😀🇩🇪, two  spaces,\n\ttabs; word"


@functools.cache
def tokenizer_of(name: str) -> Any:
    made: Any = {
        "smollm2": smollm2_tokenizer,
        "bytes": byte_tokenizer,
        "byte_fallback": lambda: byte_fallback()[0],
        "sentencepiece": lambda: sentencepiece()[0],
    }[name]()
    return made


TOKENIZERS = ("smollm2", "bytes", "byte_fallback", "sentencepiece")


def decoded(tokenizer: Any, ids: Sequence[int]) -> str:
    """Return the text of all tokens at once."""
    special = find_special_ids(tokenizer)
    kept = [token for token in ids if token not in special]
    return str(tokenizer.decode(kept, clean_up_tokenization_spaces=False)) if kept else ""


class Told:
    """An answer that is told tokens, and what it passes on."""

    def __init__(self, tokenizer: Any, options: Options = DEFAULT, prompt: Sequence[int] = (1, 2)) -> None:
        self.deltas: list[Delta] = []
        self.answer = Answer(tokenizer, options, self.deltas.append)
        self.answer.put(torch.tensor([list(prompt)]))
        self.ids = list(prompt)

    def take(self, tokens: Sequence[int], *, ends: bool = True) -> Told:
        """Tell tokens until the answer stops, as a decoding loop does."""
        for token in tokens:
            self.ids.append(token)
            self.answer.put(torch.tensor([token]))
            if bool(self.answer(torch.tensor([self.ids]), None)):
                break
        if ends:
            self.answer.end()
        return self

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def tokens(self) -> list[int]:
        return [token for delta in self.deltas for token in delta.tokens]


# --- text ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["smollm2", "bytes", "sentencepiece"])
def test_deltas_add_up_to_the_text(name: str) -> None:
    tokenizer = tokenizer_of(name)
    size = len(tokenizer)

    @settings(max_examples=150, deadline=None)
    @given(st.lists(st.integers(0, size - 1), max_size=40))
    def check(ids: list[int]) -> None:
        told = Told(tokenizer).take(ids)
        assert told.text == decoded(tokenizer, ids)
        assert told.tokens == ids

    check()


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(byte_fallback()[1]), max_size=20))
def test_deltas_of_byte_fallback_add_up_to_the_text(parts: list[list[int]]) -> None:
    tokenizer = tokenizer_of("byte_fallback")
    ids = [token for part in parts for token in part]
    assert Told(tokenizer).take(ids).text == decoded(tokenizer, ids)


def test_characters_before_an_invalid_byte_are_kept() -> None:
    tokenizer = tokenizer_of("byte_fallback")
    ids = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in "é€".encode()[:-1]]
    assert decoded(tokenizer, ids) == 4 * "\ufffd"  # the decoder gives up the whole row of bytes
    assert Told(tokenizer).take(ids).text.rstrip("\ufffd") == "é"


@pytest.mark.parametrize("name", ["smollm2", "bytes"])
def test_any_text_comes_through(name: str) -> None:
    tokenizer = tokenizer_of(name)

    @settings(max_examples=150, deadline=None)
    @given(st.text(max_size=60), st.integers(0, 3))
    def check(text: str, num_cut: int) -> None:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = ids[: len(ids) - num_cut]  # may end within a character
        told = Told(tokenizer).take(ids)
        assert told.text == decoded(tokenizer, ids)
        if num_cut == 0 and tokenizer.decode(ids) == text:  # SmolLM2 lacks some bytes
            assert told.text == text

    check()


@pytest.mark.parametrize("name", ["smollm2", "bytes"])
def test_text_comes_with_the_token_that_completes_it(name: str) -> None:
    tokenizer = tokenizer_of(name)
    ids = tokenizer(PASSAGE)["input_ids"]
    told = Told(tokenizer)
    for count, token in enumerate(ids, 1):
        told.take([token], ends=False)
        whole = decoded(tokenizer, ids[:count])
        assert told.text == whole.rstrip("\ufffd")
    assert told.text == PASSAGE


def test_garbage_is_not_held_back_for_long() -> None:
    tokenizer = tokenizer_of("bytes")
    follow = tokenizer("é")["input_ids"][1:]  # a byte that no character begins with
    told = Told(tokenizer).take(follow * 60, ends=False)
    assert len(told.text) > 40
    told.answer.end()
    assert told.text == "\ufffd" * 60


def test_special_tokens_are_no_text() -> None:
    tokenizer = tokenizer_of("smollm2")
    ids = tokenizer("one<|im_end|> two")["input_ids"]
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in ids
    told = Told(tokenizer).take(ids)
    assert told.text == "one two"
    assert told.tokens == ids


@pytest.mark.parametrize("name", ["sentencepiece", "byte_fallback"])
def test_leading_space_is_the_answers_only_where_it_continues(name: str) -> None:
    tokenizer = tokenizer_of(name)
    before, after = (tokenizer.convert_tokens_to_ids(piece) for piece in ("▁a", "▁b"))
    assert Told(tokenizer, Options(), [before]).take([after]).text == "b"
    assert Told(tokenizer, Options(continues=True), [before]).take([after]).text == " b"


@pytest.mark.parametrize("name", TOKENIZERS)
def test_bytes_of_tokens_are_those_of_the_text(name: str) -> None:
    tokenizer = tokenizer_of(name)
    for text in ("é€ ab", " a b") if name in ("sentencepiece", "byte_fallback") else (PASSAGE, "é"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if name == "byte_fallback":
            ids = [tokenizer.convert_tokens_to_ids(f"<0x{byte:02X}>") for byte in text.encode()]
        found = b"".join(token_bytes(tokenizer, token) for token in ids).decode()
        assert found.lstrip() == text.lstrip()


def test_nothing_before_the_prompt_is_told() -> None:
    detokenizer = Detokenizer(tokenizer_of("smollm2"), tokenizer_of("smollm2")("Once upon")["input_ids"])
    assert detokenizer.end() == ""


# --- stop texts ------------------------------------------------------------------------------------------------------


def told_text(text: str, *stop: str, name: str = "bytes") -> Told:
    tokenizer = tokenizer_of(name)
    return Told(tokenizer, Options(stop=stop)).take(tokenizer(text)["input_ids"])


@pytest.mark.parametrize("name", ["bytes", "smollm2"])
@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one two three", ("two",), "one "),
        ("one two three", ("e tw",), "on"),  # over the borders of tokens
        ("one two three", ("three", "two"), "one "),
        ("abcd", ("abcx", "bc"), "a"),
        ("aaab", ("aab",), "a"),
        ("one", ("one",), ""),
        ("one\n\ntwo", ("\n\n",), "one"),
        ("caf\u00e9 x", ("\u00e9",), "caf"),
        ("a😀b", ("😀",), "a"),
        ("ab", ("abc",), "ab"),  # what may have become a stop text comes at the end
        ("abab", ("abc", "bx"), "abab"),
    ],
)
def test_answer_ends_before_a_stop_text(text: str, stops: tuple[str, ...], expected: str, name: str) -> None:
    told = told_text(text, *stops, name=name)
    assert told.text == expected
    assert told.answer.is_stopped == (expected != text)


@settings(max_examples=300, deadline=None)
@given(st.text("ab é", max_size=30), st.lists(st.text("ab é", min_size=1, max_size=4), min_size=1, max_size=4))
def test_stops_are_those_of_the_whole_text(text: str, stops: list[str]) -> None:
    told = told_text(text, *stops)
    # The first token that completes one of them ends the answer.
    ends = [text.find(stop) + len(stop) for stop in stops if stop in text]
    read = text[: min(ends, default=len(text))]
    assert told.text == text[: min((read.find(stop) for stop in stops if stop in read), default=len(text))]
    assert told.answer.is_stopped == bool(ends)


def test_only_what_may_become_a_stop_text_is_held_back() -> None:
    tokenizer = tokenizer_of("bytes")
    told = Told(tokenizer, Options(stop=("END", "x")))
    seen = []
    for token in tokenizer("a EN bENDc")["input_ids"]:
        told.take([token], ends=False)
        seen.append(told.text)
        if told.answer.is_stopped:
            break
    assert seen == ["a", "a ", "a ", "a ", "a EN ", "a EN b", "a EN b", "a EN b", "a EN b"]
    told.answer.end()
    assert told.text == "a EN b"


def test_special_token_as_stop_text() -> None:
    told = told_text("one two<|im_end|> three", "<|im_end|>", "twofold", name="smollm2")
    assert told.answer.is_stopped
    assert told.text == "one two"


def test_unknown_token_is_not_a_stop_text() -> None:
    tokenizer = tokenizer_of("smollm2")
    unknown = tokenizer.convert_tokens_to_ids("zzz zzz")
    assert unknown in find_special_ids(tokenizer)
    told = Told(tokenizer, Options(stop=("zzz zzz",), ignore_eos=True)).take([unknown])
    assert not told.answer.is_stopped


def test_special_token_after_half_a_character() -> None:
    tokenizer = tokenizer_of("bytes")
    half = tokenizer("é")["input_ids"][:1]
    told = Told(tokenizer, Options(stop=("<|user|>",))).take([*half, tokenizer.convert_tokens_to_ids("<|user|>")])
    assert told.text == "\ufffd"
    assert told.answer.is_stopped


@pytest.mark.parametrize(
    ("options", "tokens", "reason"),
    [
        (Options(), [5, 6, 7], "length"),
        (Options(), [5, 6], "stop"),
        (Options(), [5, 6, "end"], "stop"),
        (Options(), [5, 6, 9], "stop"),
        (Options(ignore_eos=True), [5, 6, "end"], "length"),
    ],
)
def test_reason(options: Options, tokens: list[Any], reason: str) -> None:
    tokenizer = tokenizer_of("bytes")
    tokens = [tokenizer.eos_token_id if token == "end" else token for token in tokens]
    answer = Answer(tokenizer, options, lambda event: None, end_tokens=[9])
    assert answer.reason(tokens, 3) == reason


def test_reason_of_a_stop_text_with_the_last_token() -> None:
    told = told_text("abc", "c")
    assert told.answer.reason(told.tokens, 3) == "stop"


# --- how tokens are chosen -------------------------------------------------------------------------------------------


def chooser(options: Options, **of_model: Any) -> Chooser:
    """Return what chooses the tokens of an answer; `of_model` are values of the model's generation_config."""
    tokenizer = tokenizer_of("bytes")
    model = models.llama(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    for name, value in of_model.items():
        setattr(model.generation_config, name, value)
    answer = Answer(tokenizer, options, lambda event: None)
    arguments = check_generate_arguments(model, answer.arguments(model.generation_config))
    return prepare(model, PROMPT, NUM_NEW, arguments, seed=1)


def logits(*, seed: int = 0) -> Tensor:
    return torch.randn(1, len(tokenizer_of("bytes")), generator=torch.Generator().manual_seed(seed))


SAMPLING = {"do_sample": True, "temperature": 0.2, "top_k": 3, "top_p": 0.1, "typical_p": 0.2, "min_p": 0.3}


@pytest.mark.parametrize("temperature", [0.0, 1e-7])
@pytest.mark.parametrize("of_model", [{}, SAMPLING])
def test_greedy_is_plain(temperature: float, of_model: dict[str, Any]) -> None:
    found = chooser(Options(temperature=temperature), **of_model)
    assert found.is_plain
    assert found.max_length == PROMPT.shape[1] + NUM_NEW
    assert found.end_tokens == {tokenizer_of("bytes").eos_token_id}


def test_temperature_and_top_p_are_the_requests_alone() -> None:
    found = chooser(Options(temperature=0.5, top_p=0.9), **SAMPLING)
    scores = logits()
    expected = TopPLogitsWarper(0.9)(PROMPT, TemperatureLogitsWarper(0.5)(PROMPT, scores))
    torch.testing.assert_close(found.processors(PROMPT, scores.clone()), expected)
    assert int(torch.isfinite(expected).sum()) < scores.shape[-1]


def test_default_options_sample_what_the_model_says() -> None:
    found = chooser(Options(), **SAMPLING)
    scores = logits()
    assert found.config.do_sample
    assert torch.equal(found.processors(PROMPT, scores.clone()), scores)


def test_small_temperatures_and_top_p_are_finite() -> None:
    found = chooser(Options(temperature=1e-5, top_p=1e-9))
    scores = 30 * logits()
    assert int(found.choose(PROMPT, scores.clone())) == int(scores.argmax())


@pytest.mark.parametrize("of_model", [{}, {"eos_token_id": [5, 6]}, {"eos_token_id": 5, "pad_token_id": 5}])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_end_tokens_are_ignored_on_request(temperature: float, of_model: dict[str, Any]) -> None:
    tokenizer = tokenizer_of("bytes")
    ends = of_model.get("eos_token_id", tokenizer.eos_token_id)
    ends = [ends] if isinstance(ends, int) else ends
    usual = chooser(Options(temperature=temperature), **of_model)
    ignoring = chooser(Options(temperature=temperature, ignore_eos=True), **of_model)
    assert usual.end_tokens == set(ends) and ignoring.end_tokens == set()
    assert ignoring.max_length == usual.max_length
    for token in {*ends, tokenizer.eos_token_id}:
        ids = torch.tensor([[*PROMPT[0].tolist(), token]])
        assert usual.ends(ids, logits()) == (token in ends)
        assert not ignoring.ends(ids, logits())
    assert ignoring.is_plain == (temperature == 0)


def test_stop_text_ends_the_sequence() -> None:
    tokenizer = tokenizer_of("bytes")
    found = chooser(Options(temperature=0, stop=("b",)))
    assert not found.is_plain
    found.begin(PROMPT)
    a, b = tokenizer("ab")["input_ids"]
    for token, ends in ((a, False), (b, True)):
        found.tell(torch.tensor([[token]]))
        assert found.ends(PROMPT, logits()) == ends


# --- log-probabilities, bias, penalties ------------------------------------------------------------------------------


def test_logprobs_are_those_before_bias_penalties_and_temperature() -> None:
    tokenizer = tokenizer_of("bytes")
    deltas: list[Delta] = []
    options = Options(
        temperature=0.3, top_p=0.5, top_logprobs=3, logit_bias={7: 100.0}, frequency_penalty=2.0, presence_penalty=1.0
    )
    model = models.llama(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)
    answer = Answer(tokenizer, options, deltas.append)
    made = prepare(model, PROMPT, NUM_NEW, check_generate_arguments(model, answer.arguments()), seed=1)
    made.begin(PROMPT)
    ids = PROMPT
    for step in range(3):
        scores = logits(seed=step)
        token = made.choose(ids, scores.clone())
        assert int(token) == 7  # the bias outweighs the rest
        made.tell(token)
        ids = torch.cat([ids, token], dim=-1)
        expected = torch.log_softmax(scores[0], dim=-1)
        (found,) = deltas[-1].logprobs
        assert found.logprob == pytest.approx(float(expected[7]), abs=1e-6)
        values, best = expected.topk(3)
        assert [token for token, _ in found.top] == best.tolist()
        assert [value for _, value in found.top] == pytest.approx(values.tolist(), abs=1e-6)


def test_no_top_logprobs_are_still_the_tokens_own() -> None:
    recorder = LogprobRecorder(0)
    scores = logits()
    assert recorder(PROMPT, scores) is scores
    assert recorder.of(5).top == ()
    assert recorder.of(5).logprob == pytest.approx(float(torch.log_softmax(scores[0], -1)[5]))


def test_more_top_logprobs_than_tokens() -> None:
    recorder = LogprobRecorder(20)
    recorder(PROMPT, torch.tensor([[1.0, 2.0, 0.5]]))
    assert [token for token, _ in recorder.of(0).top] == [1, 0, 2]


def test_bias_is_added() -> None:
    scores = logits()
    found = LogitBias({3: 1.5, 5: -100, 10**17: 4.0})(PROMPT, scores.clone())
    expected = scores.clone()
    expected[0, 3] += 1.5
    expected[0, 5] -= 100
    torch.testing.assert_close(found, expected)


def test_penalties_count_the_answers_tokens_alone() -> None:
    penalties = Penalties(frequency=0.5, presence=0.25)
    scores = logits()
    ids = PROMPT
    torch.testing.assert_close(penalties(ids, scores.clone()), scores)
    counts = torch.zeros_like(scores)
    for token in (9, 9, 2, 9, 1):  # 1 and 2 are in the prompt
        ids = torch.cat([ids, torch.tensor([[token]])], dim=-1)
        counts[0, token] += 1
        expected = scores - counts * 0.5 - (counts > 0).float() * 0.25  # OpenAI's formula
        torch.testing.assert_close(penalties(ids, scores.clone()), expected)


# --- in responses ----------------------------------------------------------------------------------------------------


def logprob_deltas() -> tuple[Any, list[Delta]]:
    """Return a tokenizer, and the answer "aé" with log-probabilities, of three tokens."""
    tokenizer = tokenizer_of("bytes")
    told: list[Delta] = []
    answer = Answer(tokenizer, Options(top_logprobs=1), told.append)
    answer.put(PROMPT)
    processors = answer.arguments()["logits_processor"]
    for token in tokenizer("aé")["input_ids"]:
        scores = torch.full((1, len(tokenizer)), -1e30)
        scores[0, token] = 1.0
        processors(PROMPT, scores)
        answer.put(torch.tensor([token]))
    answer.end()
    return tokenizer, told


def test_logprobs_of_a_chat() -> None:
    tokenizer, deltas = logprob_deltas()
    response = ChatResponse(tokenizer, "tiny", Prompt(PROMPT[0, :0], PROMPT[0]))
    response.has_logprobs = True
    chunks = [response.add(delta) for delta in deltas]
    entries = [entry for chunk in chunks if chunk for entry in chunk["choices"][0]["logprobs"]["content"]]
    assert [entry["token"] for entry in entries] == ["a", "bytes:\\xc3", "bytes:\\xa9"]
    assert bytes(byte for entry in entries for byte in entry["bytes"]) == "aé".encode()
    assert all(entry["logprob"] == pytest.approx(0.0) for entry in entries)
    assert [entry["top_logprobs"] for entry in entries] == [
        [{name: entry[name] for name in ("token", "logprob", "bytes")}] for entry in entries
    ]
    whole = response.complete(Ended("stop", 3))
    assert whole["choices"][0]["message"]["content"] == "aé"
    assert whole["choices"][0]["logprobs"] == {"content": entries, "refusal": None}


def test_logprobs_of_a_completion() -> None:
    tokenizer, deltas = logprob_deltas()
    response = CompletionResponse(tokenizer, "tiny", Prompt(PROMPT[0, :0], PROMPT[0]))
    response.has_logprobs = True
    for delta in deltas:
        response.add(delta)
    found = response.complete(Ended("length", 3))["choices"][0]
    assert found["text"] == "aé" and found["finish_reason"] == "length"
    assert found["logprobs"]["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xa9"]
    assert found["logprobs"]["token_logprobs"] == pytest.approx([0.0, 0.0, 0.0])
    assert [list(top) for top in found["logprobs"]["top_logprobs"]] == [["a"], ["bytes:\\xc3"], ["bytes:\\xa9"]]
    assert found["logprobs"]["text_offset"] == [0, 1, 1]
