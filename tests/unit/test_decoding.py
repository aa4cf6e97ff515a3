"""`generate` at one rank in the exact setting, against transformers' own; what it refuses; what it leaves unchanged."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    StoppingCriteriaList,
    TextStreamer,
)

import apb_ds
from tests.generation_parts import Recorder, StopAfter
from tests.models import VOCAB_SIZE, build_model, distinct_ids, llama, mistral, phi3, request_ids

# Nothing in front, everything passed on: the answer is the plain model's.
EXACT: dict[str, Any] = {"hosts": 4, "anchor_length": 0, "passing_length": 4096}
APPROXIMATE: dict[str, Any] = {"hosts": 4, "anchor_length": 12, "passing_length": 4}


def new_engine(model: Any, **given: Any) -> Any:
    return apb_ds.init_inference(model, apb_ds.APBConfig(**given))


@pytest.fixture(scope="module")
def exact() -> Any:
    return new_engine(build_model("llama"), **EXACT)


@pytest.fixture(scope="module")
def approximate() -> Any:
    return new_engine(build_model("llama"), **APPROXIMATE)


@pytest.fixture(scope="module")
def plain() -> Any:
    return build_model("llama")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i:03d}": i for i in range(VOCAB_SIZE)}
    words["abcdef"] = VOCAB_SIZE  # what StopStringCriteria tries a tokenizer with
    backend = Tokenizer(models.WordLevel(words, unk_token="w000"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w000")


def own_tokens(model: Any, prompt: torch.Tensor, **arguments: Any) -> list[int]:
    """The new tokens of transformers' own `generate`."""
    tokens = model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **arguments)
    return tokens[0, prompt.shape[1] :].tolist()


def apb_tokens(engine: Any, document: torch.Tensor, query: torch.Tensor, **arguments: Any) -> list[int]:
    tokens = engine.generate(document, query, **arguments)
    assert tokens.dtype == torch.int64
    assert tokens.shape == (1, engine.stats.new_tokens)
    return tokens[0].tolist()


class FailAt(LogitsProcessor):
    """Raises when it sees `length` ids."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if input_ids.shape[1] == self.length:
            raise ValueError("this processor had enough")
        return scores


class Watcher(LogitsProcessor):
    """Changes nothing and keeps the ids that it is given."""

    def __init__(self) -> None:
        self.seen: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.seen.append(input_ids.clone())
        return scores


@functools.cache
def _eos_of(plain: Any) -> int:
    """A token that the greedy answer to the tests' request reaches after a few others."""
    tokens = own_tokens(plain, torch.cat(request_ids(83, 6), dim=1), max_new_tokens=12, do_sample=False)
    return next(token for i, token in enumerate(tokens) if i >= 3 and token not in tokens[:i])


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"repetition_penalty": 1.6},
        {"no_repeat_ngram_size": 1},
        {"eos_token_id": "eos"},
        {"eos_token_id": "eos", "min_new_tokens": 9},
        {"eos_token_id": ["eos", 3]},
        {"bad_words_ids": [["eos"]]},
        {"max_length": 95, "max_new_tokens": None},
        {"generation_config": GenerationConfig(max_new_tokens=7, repetition_penalty=1.4), "max_new_tokens": None},
        {"logits_processor": LogitsProcessorList([lambda ids, scores: scores.roll(1, dims=-1)])},
        {"stopping_criteria": StoppingCriteriaList([StopAfter(94)])},
        {"attention_mask": torch.ones(1, 89, dtype=torch.int64)},
        {"synced_gpus": True},
    ],
    ids=lambda arguments: ", ".join(arguments) or "plain",
)
def test_greedy_is_transformers_own(exact: Any, plain: Any, arguments: dict[str, Any]) -> None:
    def filled(value: Any) -> Any:
        if isinstance(value, list):
            return [filled(item) for item in value]
        return _eos_of(plain) if isinstance(value, str) else value

    arguments = {"max_new_tokens": 12, "do_sample": False, **{name: filled(v) for name, v in arguments.items()}}
    document, query = request_ids(83, 6)
    ours = ("attention_mask", "synced_gpus")
    theirs = {name: value for name, value in arguments.items() if name not in ours and value is not None}
    expected = own_tokens(plain, torch.cat([document, query], dim=1), **theirs)
    assert apb_tokens(exact, document, query, **arguments) == expected


def test_the_arguments_above_change_the_answer(plain: Any) -> None:
    """Without this, equality with transformers could mean that both ignore them."""
    prompt, eos = torch.cat(request_ids(83, 6), dim=1), _eos_of(plain)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    bare = own_tokens(plain, prompt, **options)
    short = own_tokens(plain, prompt, eos_token_id=eos, **options)
    assert 3 < len(short) < 12
    assert bare[: len(short)] == short
    assert len(own_tokens(plain, prompt, eos_token_id=eos, min_new_tokens=9, **options)) >= 9
    for changing in ({"repetition_penalty": 1.6}, {"no_repeat_ngram_size": 1}, {"bad_words_ids": [[eos]]}):
        assert own_tokens(plain, prompt, **options, **changing) != bare, changing


@pytest.mark.parametrize(
    "arguments",
    [{}, {"temperature": 2.5}, {"top_k": 5}, {"top_p": 0.7, "temperature": 1.8}, {"repetition_penalty": 1.3}],
    ids=lambda arguments: ", ".join(arguments) or "plain",
)
def test_sampling_is_transformers_own(exact: Any, plain: Any, arguments: dict[str, Any]) -> None:
    """One draw a token from the same distribution: with equal seeds the tokens are equal."""
    document, query = request_ids(83, 6)
    options = {"max_new_tokens": 12, "do_sample": True, "temperature": 3.0, **arguments}
    answers = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        expected = own_tokens(plain, torch.cat([document, query], dim=1), **options)
        torch.manual_seed(seed)
        assert apb_tokens(exact, document, query, **options) == expected
        answers.append(expected)
    assert answers[0] != answers[1]


def test_a_seeded_answer_does_not_depend_on_the_global_random_state(exact: Any, plain: Any) -> None:
    document, query = request_ids(83, 6)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": True, "temperature": 3.0}
    torch.manual_seed(5)
    expected = own_tokens(plain, torch.cat([document, query], dim=1), **options)
    context = exact.prefill(document)
    for state in (0, 1):
        torch.manual_seed(state)
        before = torch.random.get_rng_state()
        assert apb_tokens(exact, document, query, seed=5, **options) == expected
        assert exact.generate(query_ids=query, context=context, seed=5, **options)[0].tolist() == expected
        assert torch.equal(torch.random.get_rng_state(), before)
        assert apb_tokens(exact, document, query, seed=6, **options) != expected
    greedy: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    assert apb_tokens(exact, document, query, seed=5, **greedy) == apb_tokens(exact, document, query, **greedy)


def test_processors_see_the_whole_prompt(approximate: Any) -> None:
    document, query = request_ids(83, 6)
    watcher = Watcher()
    tokens = approximate.generate(
        document, query, max_new_tokens=3, do_sample=False, logits_processor=LogitsProcessorList([watcher])
    )
    everything = torch.cat([document, query, tokens], dim=1)
    assert [ids.tolist() for ids in watcher.seen] == [everything[:, :length].tolist() for length in (89, 90, 91)]


def test_stop_strings(exact: Any, plain: Any, tokenizer: Any) -> None:
    document, query = request_ids(83, 6)
    stop = f"w{_eos_of(plain):03d}"
    arguments = {"max_new_tokens": 12, "do_sample": False, "stop_strings": [stop], "tokenizer": tokenizer}
    tokens = apb_tokens(exact, document, query, **arguments)
    assert tokens == own_tokens(plain, torch.cat([document, query], dim=1), **arguments)
    assert 3 < len(tokens) < 12
    assert tokenizer.decode(tokens).endswith(stop)
    config = GenerationConfig(max_new_tokens=12, do_sample=False, stop_strings=stop)
    assert apb_tokens(exact, document, query, generation_config=config, tokenizer=tokenizer) == tokens
    assert config.stop_strings == stop
    earlier: dict[str, Any] = {**arguments, "stopping_criteria": StoppingCriteriaList([StopAfter(91)])}
    assert apb_tokens(exact, document, query, **earlier) == tokens[:2]


def test_streamer_gets_prompt_then_tokens_then_end(approximate: Any) -> None:
    document, query = request_ids(83, 6)
    streamer = Recorder()
    tokens = apb_tokens(approximate, document, query, max_new_tokens=5, do_sample=False, streamer=streamer)
    prompt = torch.cat([document, query], dim=1).tolist()
    assert streamer.events == [prompt, *([token] for token in tokens), "end"]


def test_text_streamer_prints_the_answer(approximate: Any, tokenizer: Any, capsys: Any) -> None:
    document, query = request_ids(83, 6)
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    tokens = apb_tokens(approximate, document, query, max_new_tokens=5, do_sample=False, streamer=streamer)
    assert capsys.readouterr().out.split() == [f"w{token:03d}" for token in tokens]


def test_stats_of_a_call(approximate: Any) -> None:
    document, query = request_ids(83, 6)
    approximate.generate(document, query, max_new_tokens=5, do_sample=False)
    stats = approximate.stats
    assert stats.new_tokens == 5
    assert min(stats.prefill_s, stats.query_s, stats.decode_s) > 0
    context = approximate.prefill(document)
    assert approximate.stats.new_tokens == 0
    approximate.generate(query_ids=query, context=context, max_new_tokens=1, do_sample=False)
    assert (approximate.stats.new_tokens, approximate.stats.prefill_s, approximate.stats.decode_s) == (1, 0, 0)


def test_a_prompt_beyond_deepspeeds_own_limit(exact: Any, plain: Any) -> None:
    document, query = request_ids(1300, 8)
    expected = own_tokens(plain, torch.cat([document, query], dim=1), max_new_tokens=3, do_sample=False)
    assert apb_tokens(exact, document, query, max_new_tokens=3, do_sample=False) == expected


def test_input_ids_are_split(exact: Any, plain: Any) -> None:
    ids = distinct_ids(89)
    expected = own_tokens(plain, ids, max_new_tokens=4, do_sample=False)
    answer = exact.generate(input_ids=ids, query_length=6, max_new_tokens=4, do_sample=False)
    assert answer[0].tolist() == ids[0].tolist() + expected


def test_new_tokens_default_to_transformers_own(exact: Any, plain: Any) -> None:
    document, query = request_ids(83, 6)
    expected = own_tokens(plain, torch.cat([document, query], dim=1), do_sample=False)
    assert apb_tokens(exact, document, query, do_sample=False) == expected


def test_a_conversation_is_the_concatenated_ids(exact: Any, plain: Any) -> None:
    document, rest = request_ids(83, 12)
    first, second, third = rest[:, :5], rest[:, 5:6], rest[:, 6:]
    context = exact.prefill(document)
    so_far = document
    for query in (first, second, third):
        so_far = torch.cat([so_far, query], dim=1)
        expected = own_tokens(plain, so_far, max_new_tokens=4, do_sample=False)
        tokens = exact.generate(query_ids=query, context=context, append=True, max_new_tokens=4, do_sample=False)
        assert tokens[0].tolist() == expected
        so_far = torch.cat([so_far, tokens], dim=1)
        assert torch.equal(context.token_ids, so_far)
        assert context.num_tokens == so_far.shape[1]


@pytest.mark.parametrize("turns", [0, 1])
def test_a_context_stays_as_it_was(approximate: Any, turns: int) -> None:
    """Before and after are equal bit for bit, whether or not a turn was kept before."""
    document, query = request_ids(140, 6)
    context = approximate.prefill(document, query)
    options: dict[str, Any] = {"context": context, "do_sample": False}
    for _ in range(turns):
        approximate.generate(query_ids=query, append=True, max_new_tokens=3, **options)
    before = approximate.query_logits(query, context=context)
    num_tokens, cached, shard = context.num_tokens, context.num_cached, context.cache.local_lengths()[None]

    answer = approximate.generate(query_ids=query, max_new_tokens=6, **options)
    approximate.query_logits(query.flip(1), context=context)
    for append in (False, True):
        for fails_at in (0, 3):
            failing = LogitsProcessorList([FailAt(num_tokens + 6 + fails_at)])
            with pytest.raises(ValueError, match="had enough"):
                approximate.generate(
                    query_ids=query, append=append, max_new_tokens=6, logits_processor=failing, **options
                )
    assert (context.num_tokens, context.num_cached, context.cache.local_lengths()[None]) == (num_tokens, cached, shard)
    assert torch.equal(approximate.query_logits(query, context=context), before)
    assert torch.equal(approximate.generate(query_ids=query, max_new_tokens=6, **options), answer)


def test_the_global_random_state_is_not_drawn_from_by_greedy(approximate: Any) -> None:
    document, query = request_ids(83, 6)
    before = torch.random.get_rng_state()
    approximate.generate(document, query, max_new_tokens=3, do_sample=False)
    assert torch.equal(torch.random.get_rng_state(), before)


DOCUMENT, QUERY = request_ids(83, 6)
IDS = {"document_ids": DOCUMENT, "query_ids": QUERY}

REFUSED_IDS = [
    ({**IDS, "document_ids": DOCUMENT.expand(2, -1)}, ["document_ids", "batch of 2"]),
    ({**IDS, "query_ids": QUERY.expand(3, -1)}, ["query_ids", "batch of 3"]),
    ({**IDS, "document_ids": DOCUMENT[:, :0]}, ["document_ids", "empty"]),
    ({**IDS, "query_ids": QUERY[:, :0]}, ["query_ids", "empty"]),
    ({**IDS, "document_ids": DOCUMENT.int()}, ["document_ids", "torch.int32"]),
    ({**IDS, "document_ids": DOCUMENT.float()}, ["document_ids", "torch.float32"]),
    ({**IDS, "query_ids": QUERY[0]}, ["query_ids", "(6,)"]),
    ({**IDS, "query_ids": QUERY.tolist()}, ["query_ids", "list"]),
    ({**IDS, "document_ids": DOCUMENT + VOCAB_SIZE}, ["document_ids", str(VOCAB_SIZE - 1)]),
    ({**IDS, "query_ids": -1 - QUERY}, ["query_ids", "-"]),
    ({"query_ids": QUERY}, ["document_ids", "context"]),
    ({**IDS, "input_ids": DOCUMENT, "query_length": 3}, ["input_ids"]),
    ({**IDS, "query_length": 3}, ["query_length", "input_ids"]),
    ({}, ["document_ids", "none of them"]),
    ({"query_ids": QUERY, "query_length": 3}, ["query_length", "query_ids"]),
    ({"input_ids": DOCUMENT, "inputs": DOCUMENT}, ["input_ids, inputs"]),
    ({"input_ids": DOCUMENT[0]}, ["input_ids", "(rows, tokens)", "(83,)"]),
    ({"inputs": DOCUMENT.tolist()}, ["inputs", "list"]),
    ({"input_ids": DOCUMENT[:, :1]}, ["input_ids", "two"]),
    ({"input_ids": DOCUMENT[:, :0]}, ["input_ids", "empty"]),
    ({"input_ids": torch.cat([DOCUMENT, DOCUMENT + VOCAB_SIZE])}, ["input_ids[1]", "vocabulary"]),
    ({"input_ids": DOCUMENT, "append": True}, ["append"]),
    ({"input_ids": DOCUMENT, "query_length": 0}, ["query_length=0", "82"]),
    ({"input_ids": DOCUMENT, "query_length": -1}, ["query_length=-1"]),
    ({"input_ids": DOCUMENT, "query_length": 83}, ["query_length=83", "82"]),
    ({**IDS, "append": True}, ["append", "context"]),
    ({**IDS, "append": "no"}, ["append='no'"]),
    ({"query_ids": QUERY, "context": DOCUMENT}, ["context", "engine.prefill", "Tensor"]),
    ({**IDS, "attention_mask": torch.tensor([[0] + [1] * 88])}, ["attention_mask"]),
    ({"input_ids": DOCUMENT, "attention_mask": torch.tensor([[1] * 82 + [0]])}, ["right of row 0", "padding_side"]),
    ({"input_ids": DOCUMENT, "attention_mask": torch.tensor([[0, 1, 0] + [1] * 80])}, ["between", "row 0"]),
    ({"input_ids": DOCUMENT, "attention_mask": torch.zeros_like(DOCUMENT)}, ["input_ids", "empty"]),
    ({"input_ids": DOCUMENT, "attention_mask": torch.ones(1, 82)}, ["attention_mask", "(1, 83)"]),
    ({"input_ids": DOCUMENT, "attention_mask": 2 * torch.ones_like(DOCUMENT)}, ["attention_mask", "zeros and ones"]),
    ({**IDS, "max_new_tokens": 0}, ["max_new_tokens=0"]),
    ({**IDS, "max_new_tokens": -2}, ["max_new_tokens=-2"]),
    ({**IDS, "max_new_tokens": 2.5}, ["max_new_tokens=2.5"]),
    ({**IDS, "max_new_tokens": True}, ["max_new_tokens=True"]),
    *(({**IDS, "seed": seed}, [f"seed={seed}", "integer"]) for seed in (-1, 2**64, 1.0, True)),
    ({**IDS, "seed": "5"}, ["seed='5'"]),
    ({**IDS, "max_new_tokens": 4009}, ["4098", "max_position_embeddings=4096"]),
]


def assert_refused(engine: Any, arguments: dict[str, Any], named: list[str]) -> None:
    arguments = {"max_new_tokens": 3, "do_sample": False, **arguments}
    with pytest.raises(ValueError) as caught:
        engine.generate(**arguments)
    assert all(word in str(caught.value) for word in named), caught.value


@pytest.mark.parametrize("arguments, named", REFUSED_IDS, ids=lambda value: str(value)[:60])
def test_refuses_bad_input(approximate: Any, arguments: dict[str, Any], named: list[str]) -> None:
    assert_refused(approximate, arguments, named)


REFUSED_SETTINGS: dict[str, Any] = {
    "num_beams": 2,
    "num_return_sequences": 2,
    "use_cache": False,
    "return_dict_in_generate": True,
    "prompt_lookup_num_tokens": 3,
    "cache_implementation": "static",
    "guidance_scale": 2.0,
}


@pytest.mark.parametrize("name", REFUSED_SETTINGS)
def test_refuses_settings(approximate: Any, name: str) -> None:
    given = {name: REFUSED_SETTINGS[name]}
    assert_refused(approximate, {**IDS, **given}, [name])
    assert_refused(approximate, {**IDS, **given, "generation_config": GenerationConfig()}, [name])
    config = GenerationConfig()
    setattr(config, name, given[name])
    assert_refused(approximate, {**IDS, "generation_config": config}, [name])
    assert_refused(approximate, {"input_ids": DOCUMENT, "query_length": 3, **given}, [name])


def test_several_sequences_in_the_models_own_config_are_refused_before_the_prefill() -> None:
    engine = new_engine(build_model("llama"), **APPROXIMATE)
    engine.module.generation_config.num_return_sequences = 2
    assert_refused(engine, IDS, ["num_return_sequences=2", "generation_config.json"])


@pytest.mark.parametrize("name", [name for name in REFUSED_SETTINGS if name != "num_return_sequences"])
def test_overrides_settings_of_the_models_own_generation_config(name: str, caplog: pytest.LogCaptureFixture) -> None:
    """A checkpoint trained with gradient checkpointing has use_cache=false there, for example."""
    expected = new_engine(build_model("llama"), **APPROXIMATE).generate(**IDS, max_new_tokens=5, do_sample=False)
    model = build_model("llama")
    setattr(model.generation_config, name, REFUSED_SETTINGS[name])
    with caplog.at_level("WARNING", logger="apb_ds"):
        engine = new_engine(model, **APPROXIMATE)
    for given in ({"do_sample": False}, {"generation_config": GenerationConfig(do_sample=False)}):
        assert torch.equal(engine.generate(**IDS, max_new_tokens=5, **given), expected)
    assert getattr(model.generation_config, name) == REFUSED_SETTINGS[name], "the model's own config stays"
    told = [record.getMessage() for record in caplog.records if name in record.getMessage()]
    assert len(told) == (name in ("num_beams", "guidance_scale"))


def test_a_max_length_that_the_document_exceeds() -> None:
    engine = new_engine(build_model("llama"), **APPROXIMATE)
    with pytest.raises(ValueError, match=r"max_length=20 leaves no room.*max_new_tokens"):
        engine.generate(**IDS, max_length=20)
    engine.module.generation_config.max_length = 20
    with pytest.raises(ValueError, match=r"max_length=20 .*generation_config\.json.*max_new_tokens"):
        engine.generate(**IDS)
    assert engine.generate(**IDS, max_new_tokens=2).shape == (1, 2)


def test_new_tokens_of_the_models_own_generation_config() -> None:
    engine = new_engine(build_model("llama"), **EXACT)
    engine.module.generation_config.max_new_tokens = 4
    assert engine.generate(**IDS, do_sample=False).shape == (1, 4)
    config = GenerationConfig(do_sample=False)
    assert engine.generate(**IDS, generation_config=config).shape == (1, 4)
    assert config.max_new_tokens is None


@pytest.mark.parametrize("name", ["past_key_values", "custom_generate", "inputs_embeds", "inputs"])
def test_refuses_arguments_that_are_the_engines_own(approximate: Any, name: str) -> None:
    assert_refused(approximate, {**IDS, name: True}, [name])


def test_refuses_an_assistant(approximate: Any, plain: Any) -> None:
    assert_refused(approximate, {**IDS, "assistant_model": plain}, ["assistant_model"])


def test_refuses_stop_strings_without_a_tokenizer(approximate: Any) -> None:
    assert_refused(approximate, {**IDS, "stop_strings": ["x"]}, ["stop_strings", "tokenizer"])
    config = GenerationConfig(stop_strings=["x"])
    assert_refused(approximate, {**IDS, "generation_config": config}, ["tokenizer"])


@pytest.mark.parametrize("stops", ["", [], ["x", ""], [3], 3], ids=str)
def test_refuses_stop_strings_that_are_not_texts(approximate: Any, tokenizer: Any, stops: Any) -> None:
    assert_refused(approximate, {**IDS, "stop_strings": stops, "tokenizer": tokenizer}, [f"stop_strings={stops!r}"])


def test_refuses_context_and_document_together(approximate: Any) -> None:
    context = approximate.prefill(DOCUMENT)
    assert_refused(approximate, {**IDS, "context": context}, ["document_ids", "context"])
    assert_refused(approximate, {"input_ids": DOCUMENT, "query_length": 3, "context": context}, ["input_ids"])
    assert_refused(approximate, {"query_ids": QUERY[:, :0], "context": context}, ["query_ids", "empty"])
    with pytest.raises(ValueError, match="query_ids"):
        approximate.query_logits(QUERY + VOCAB_SIZE, context=context)


def test_positions_beyond_the_model() -> None:
    """Counted with the new tokens, before the prefill."""
    engine = new_engine(llama(max_position_embeddings=100), **EXACT)
    assert engine.generate(**IDS, max_new_tokens=11, do_sample=False).shape == (1, 11)
    assert_refused(engine, {**IDS, "max_new_tokens": 12}, ["101", "max_position_embeddings=100"])
    context = engine.prefill(DOCUMENT)
    answer = engine.generate(query_ids=QUERY, context=context, append=True, max_new_tokens=8, do_sample=False)
    assert_refused(engine, {"query_ids": answer, "context": context}, ["108", "max_position_embeddings=100"])
    with pytest.raises(ValueError, match="max_position_embeddings=100"):
        engine.query_logits(answer, context=context)
    with pytest.raises(ValueError, match="max_position_embeddings=100"):
        engine.prefill(DOCUMENT, max_positions=101)


def test_a_sliding_window_shorter_than_the_request() -> None:
    engine = new_engine(mistral(sliding_window=40), **EXACT)
    prompt = torch.cat([DOCUMENT, QUERY], dim=1)
    expected = own_tokens(mistral(sliding_window=40), prompt, max_new_tokens=9, do_sample=False)
    assert expected != own_tokens(mistral(sliding_window=None), prompt, max_new_tokens=9, do_sample=False)
    assert apb_tokens(engine, DOCUMENT, QUERY, max_new_tokens=9, do_sample=False) == expected


def test_a_turn_beyond_the_frequencies_of_its_context() -> None:
    engine = new_engine(phi3(original_length=90), **EXACT)
    context = engine.prefill(DOCUMENT, QUERY)
    engine.query_logits(QUERY, context=context)
    assert_refused(engine, {"query_ids": QUERY, "context": context}, ["longrope", "92", "89", "max_positions=92"])
    context = engine.prefill(DOCUMENT, QUERY, max_positions=92)
    assert engine.generate(query_ids=QUERY, context=context, max_new_tokens=3, do_sample=False).shape == (1, 3)


def test_a_turn_on_the_same_side_of_the_switch() -> None:
    plain = phi3(original_length=200)
    expected = own_tokens(plain, torch.cat([DOCUMENT, QUERY], dim=1), max_new_tokens=3, do_sample=False)
    engine = new_engine(phi3(original_length=200), **EXACT)
    context = engine.prefill(DOCUMENT)
    tokens = engine.generate(query_ids=QUERY, context=context, max_new_tokens=3, do_sample=False)
    assert tokens[0].tolist() == expected


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("penalty_alpha", 0.6),
        ("dola_layers", "high"),
        ("assistant_early_exit", 1),
        ("num_beam_groups", 2),
        ("prefill_chunk_size", 16),
        ("position_ids", torch.zeros(1, 3)),
        ("negative_prompt_ids", torch.zeros(1, 3)),
        ("max_new_tokns", 3),
    ],
)
def test_what_would_be_ignored_is_refused_before_the_prefill(
    argument: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = new_engine(build_model("llama"), **EXACT)
    monkeypatch.setattr(engine, "prefill", lambda *_, **__: pytest.fail("the prefill ran first"))
    assert_refused(engine, {**IDS, argument: value}, [argument])


def test_a_context_of_another_engine_is_refused() -> None:
    context = new_engine(build_model("llama"), **EXACT).prefill(DOCUMENT)
    engine = new_engine(build_model("llama"), **EXACT)
    assert_refused(engine, {"query_ids": QUERY, "context": context}, ["another engine"])
