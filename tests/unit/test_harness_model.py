"""HarnessModel: prompts are cut, never changed; exact methods answer like the harness's own model."""

from __future__ import annotations

import importlib.util
import pickle
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import apb_ds
from tests import models
from tests.harness_tasks import load_tasks, responses, task_manager, write_tasks
from tests.tiny_checkpoint import byte_tokenizer

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("missing: lm_eval (pip install -e '.[eval]')", allow_module_level=True)

import lm_eval
from lm_eval.models.huggingface import HFLM

from apb_ds.tasks.lm_eval.split import RenderedPrompt, make_split, mark_turn

GENERATED = ("lamp_text", "lamp_prefix")
TEMPLATES = pytest.mark.parametrize("chat", [True, False], ids=["chat", "base"])


def tokenizer_of(chat: bool) -> Any:
    return byte_tokenizer() if chat else byte_tokenizer(template=None)


@pytest.fixture(scope="module")
def model() -> Any:
    tokenizer = byte_tokenizer()
    return models.llama(vocab_size=len(tokenizer), eos_token_id=tokenizer.eos_token_id)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("harness") / "tasks")


def evaluate(lm: Any, folder: Path, *names: str, chat: bool, **arguments: Any) -> dict[str, Any]:
    results = lm_eval.simple_evaluate(
        model=lm,
        tasks=list(names),
        task_manager=task_manager(folder),
        apply_chat_template=chat,
        bootstrap_iters=0,
        **arguments,
    )
    assert results is not None
    return results


# --- where a prompt is cut -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "rule", "query"),
    [
        ("A long text.\n\nWho?", "paragraph", "Who?"),
        ("A text of some length.\n\nQuestion: who?\nAnswer:", "paragraph", "Question: who?\nAnswer:"),
        ("A long text.\n \t\n\n  Who?\n\n", "paragraph", "  Who?\n\n"),
        ("Title\n\nA text that is far longer than its title.\nWho?", "paragraph", "Who?"),
        ("A long text without a paragraph.\nWho?", "paragraph", "Who?"),
        (
            "Title\n\nA text that is far longer than its title.",
            "paragraph",
            "A text that is far longer than its title.",
        ),
        ("Who?", "paragraph", "Who?"),
        ("", "paragraph", ""),
        ("A long text.\n\nQuestion: who?\nAnswer:", "line", "Answer:"),
        ("A long text.\n\nWho?", "turn", "A long text.\n\nWho?"),
    ],
)
def test_rules(prompt: str, rule: str, query: str) -> None:
    document, found = make_split(rule)(prompt)
    assert (document + found, found) == (prompt, query)


def test_only_the_last_turn_is_searched() -> None:
    messages = [
        {"role": "user", "content": "One.\n\nTwo?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": " A text, and more of it.\n\nWho? "},
    ]
    text = "<u>One.\n\nTwo?<a>Two.<u>A text, and more of it.\n\nWho?<end>\n\n<a>\n"
    prompt = mark_turn(text, messages, "")
    assert prompt == text and isinstance(prompt, RenderedPrompt)
    again = pickle.loads(pickle.dumps(prompt))  # as the harness keeps prompts
    for one in (prompt, again):
        assert make_split("paragraph")(one)[1] == "Who?<end>\n\n<a>\n"
        assert make_split("turn")(one)[0] == "<u>One.\n\nTwo?<a>Two.<u>"
    assert make_split("paragraph")(text)[1] == "<a>\n"  # a plain text has no turns


def test_a_text_that_the_query_begins_with() -> None:
    split = make_split("line", "Question:")
    assert split("Question: a\nText. Question: who?\nAnswer:")[1] == "Question: who?\nAnswer:"
    assert split("Text.\nAnswer:")[1] == "Answer:"


def test_a_custom_split() -> None:
    assert make_split(lambda prompt: (prompt[:3], prompt[3:]))("abcdef") == ("abc", "def")
    with pytest.raises(ValueError, match="together are the prompt; it returned 2 and 3 characters of 6"):
        make_split(lambda prompt: (prompt[:2], prompt[3:]))("abcdef")
    with pytest.raises(ValueError, match=r"split='paragraf' is not known.*'paragraph'"):
        make_split("paragraf")


@TEMPLATES
def test_what_the_anchor_embeds(chat: bool, model: Any) -> None:
    """In a chat only the question, without the turn's end; in any other text the whole query."""
    tokenizer = tokenizer_of(chat)
    ours = apb_ds.HarnessModel(apb_ds.init_inference(model), tokenizer)
    prompt = "A text of some length, and more of it.\n\nWho is it? "
    if chat:
        prompt = ours.apply_chat_template([{"role": "user", "content": prompt}])
    requests = [ours.generation(prompt, {"until": []})]
    requests += ours.scorings([((prompt, " x"), ours.tok_encode(prompt), ours.tok_encode(" x"))])
    for request in requests:
        if chat:
            assert tokenizer.decode(request.anchor_query_ids[0]) == "Who is it?\n\n"
        else:
            assert request.embedded_ids is None and request.anchor_query_ids is request.query_ids
        assert tokenizer.decode(request.query_ids[0]).startswith("Who is it?")


@TEMPLATES
@pytest.mark.parametrize("begins", [True, False])
def test_ids_are_the_harness_own(chat: bool, begins: bool, folder: Path, model: Any) -> None:
    """Document and query together are what HFLM passes to the model, and the query is the last paragraph."""
    tokenizer = tokenizer_of(chat)
    if begins:  # adds <s> unless it is there
        from tokenizers.processors import TemplateProcessing

        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
        )
    theirs = HFLM(pretrained=model, tokenizer=tokenizer)
    ours = apb_ds.HarnessModel(apb_ds.init_inference(model), tokenizer)
    for task in load_tasks(folder, *GENERATED):
        task.set_config("num_fewshot", task.config.num_fewshot or 0)
        task.set_fewshot_seed(1234)
        task.build_all_requests(
            apply_chat_template=chat, fewshot_as_multiturn=True, chat_template=ours.apply_chat_template
        )
        for instance in task.instances:
            request = ours.generation(*instance.args)
            ids = torch.cat([request.document_ids, request.query_ids], dim=1)
            expected, _ = theirs.tok_batch_encode([str(instance.args[0])])
            assert torch.equal(ids, expected)
            query = tokenizer.decode(request.query_ids[0])
            prefix = "It is" if task.task_name == "lamp_prefix" else ""
            question = instance.doc["question"]
            opened = f"{question}</s><|assistant|>{prefix}" if chat else f"{question} {prefix}".rstrip()
            assert query == opened
            before = tokenizer.decode(ids[0, : request.query_position])
            system = "<|system|>Answer in a few words.</s>" if task.task_name == "lamp_prefix" else ""
            assert before == (f"<s>{system}<|user|>" if chat else "<s>" * begins)


# --- answers ---------------------------------------------------------------------------------------------------------


@TEMPLATES
def test_an_exact_method_answers_as_the_plain_model(chat: bool, folder: Path, model: Any) -> None:
    tokenizer = tokenizer_of(chat)
    names = (*GENERATED, "lamp_choice")
    theirs = evaluate(HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1), folder, *names, chat=chat)
    engine = apb_ds.init_inference(model, apb_ds.APBConfig(method="dense"))
    ours = evaluate(apb_ds.HarnessModel(engine, tokenizer), folder, *names, chat=chat)
    for name in GENERATED:
        assert responses(ours, name) == responses(theirs, name)
        assert all(resps[0][0] for resps in responses(ours, name)), "empty answers would compare nothing"
    for our, their in zip(responses(ours, "lamp_choice"), responses(theirs, "lamp_choice"), strict=True):
        # Three choices, then the same after an empty context, for mutual information.
        assert len(our) == 6
        for (one,), (other,) in zip(our, their, strict=True):
            assert one[0] == pytest.approx(other[0], abs=1e-3)  # float32 sums in another order
            assert one[1] == other[1]
    assert ours["results"]["lamp_choice"] == theirs["results"]["lamp_choice"]


def test_stop_strings_and_lengths(folder: Path, model: Any) -> None:
    tokenizer = tokenizer_of(False)
    engine = apb_ds.init_inference(model, apb_ds.APBConfig(method="dense"))
    lm = apb_ds.HarnessModel(engine, tokenizer, sequences=1)
    whole = [resps[0][0] for resps in responses(evaluate(lm, folder, "lamp_text", chat=False), "lamp_text")]
    # A byte that is a valid text; the rest of this model's output is not UTF-8.
    stop = next(character for text in whole for character in text[1:] if character.isascii())
    asked = {"until": [stop, "never said"], "max_gen_toks": 6}
    cut = [
        resps[0][0] for resps in responses(evaluate(lm, folder, "lamp_text", chat=False, gen_kwargs=asked), "lamp_text")
    ]
    assert cut == [text.split(stop)[0] for text in whole] and cut != whole
    assert lm.engine.stats.new_tokens <= 6
    tokenizer.eos_token = stop  # not in the model's generation settings
    assert [resps[0][0] for resps in responses(evaluate(lm, folder, "lamp_text", chat=False), "lamp_text")] == [
        text.split(stop)[0] for text in whole
    ]
    short = evaluate(lm, folder, "lamp_text", chat=False, gen_kwargs={"max_gen_toks": 2})
    assert lm.engine.stats.new_tokens == 2
    assert all(len(resps[0][0]) <= 2 for resps in responses(short, "lamp_text"))


def test_a_stop_that_began_in_the_prompt_does_not_end_the_answer(model: Any) -> None:
    tokenizer = tokenizer_of(False)
    lm = apb_ds.HarnessModel(apb_ds.init_inference(model, apb_ds.APBConfig(method="dense")), tokenizer)
    prompt = "The lamp is lit at dusk.\n\nWhere is it?"
    arguments = {"until": ["#"], "max_gen_toks": 4}
    (whole,) = lm.generate_until([instance(prompt, arguments)], disable_tqdm=True)
    (same,) = lm.generate_until([instance(prompt, {**arguments, "until": ["?" + whole[0]]})], disable_tqdm=True)
    assert same == whole


def instance(*arguments: Any, kind: str = "generate_until") -> Any:
    from lm_eval.api.instance import Instance

    return Instance(kind, {}, arguments, 0, ("task", 0, 1))


def test_apb_answers_what_the_split_gives_it(model: Any) -> None:
    """Done by hand: ids cut at the last paragraph, or by a function, and passed to an engine."""
    tokenizer = tokenizer_of(True)
    config = apb_ds.APBConfig(hosts=4)
    engine = apb_ds.init_inference(model, config)
    text = "The lamp is lit at dusk and put out at dawn. " * 8 + "\n\nWhere is the lamp?"
    lm = apb_ds.HarnessModel(engine, tokenizer)
    prompt = lm.apply_chat_template([{"role": "user", "content": text}])
    ids = tokenizer(str(prompt), add_special_tokens=False, return_tensors="pt").input_ids

    def by_hand(query_length: int, question: str, **changed: Any) -> str:
        # Two header tokens precede the user's text in this template.
        engine.configure(apb_ds.APBConfig(hosts=4, query_position=2, **changed))
        embedded = tokenizer(f"{question.strip()}\n\n", add_special_tokens=False, return_tensors="pt").input_ids
        context = engine.prefill(ids[:, :-query_length], embedded)
        given = {"query_ids": ids[:, -query_length:], "context": context, "max_new_tokens": 6, "do_sample": False}
        tokens = engine.generate(**given)
        engine.configure(config)
        return tokenizer.decode(tokens[0], skip_special_tokens=True)

    tail = len("Where is the lamp?") + 2  # one byte a token, then </s> and <|assistant|>
    asked = [instance(prompt, {"until": [], "max_gen_toks": 6})]
    (answer,) = lm.generate_until(asked, disable_tqdm=True)
    assert answer == by_hand(tail, "Where is the lamp?")
    assert engine.apb_config is config, "the engine's settings are restored"
    own = apb_ds.HarnessModel(engine, tokenizer, split=lambda prompt: (prompt[:-60], prompt[-60:]))
    (other,) = own.generate_until(asked, disable_tqdm=True)
    num_special = 2 + len("</s><|assistant|>") - 2  # these two take 17 characters, and 2 tokens
    assert other == by_hand(60 - num_special + 2, text[num_special - 60 :])
    assert other != answer, "the split makes a difference"


@pytest.mark.parametrize("prompt", ["a", "A question?", "A text.\n\nA question?\n"])
def test_short_prompts(prompt: str, model: Any) -> None:
    tokenizer = tokenizer_of(False)
    lm = apb_ds.HarnessModel(apb_ds.init_inference(model, apb_ds.APBConfig(hosts=8)), tokenizer)
    (answer,) = lm.generate_until([instance(prompt, {"max_gen_toks": 3})], disable_tqdm=True)
    text = prompt if len(prompt) > 1 else f"<s>{prompt}"
    ids = tokenizer(text, return_tensors="pt").input_ids
    expected = model.generate(ids, max_new_tokens=3, do_sample=False)[0, ids.shape[1] :]
    assert answer == tokenizer.decode(expected, skip_special_tokens=True)


def test_repeats_and_sampling(model: Any) -> None:
    tokenizer = tokenizer_of(False)
    lm = apb_ds.HarnessModel(apb_ds.init_inference(model, apb_ds.APBConfig(hosts=2)), tokenizer)
    asked = [instance("A text.\n\nA question?", {"max_gen_toks": 8, "temperature": 3.0})] * 3  # as the harness repeats
    torch.manual_seed(0)
    drawn = lm.generate_until(asked, disable_tqdm=True)
    assert len(set(drawn)) == 3
    torch.manual_seed(0)
    assert lm.generate_until(asked, disable_tqdm=True) == drawn


@pytest.mark.parametrize("method", ["apb", "dense"])
def test_requests_that_are_answered_together(method: str, model: Any) -> None:
    """The same as one by one, in order; each reaches the harness's cache; the next draws differ."""
    tokenizer = tokenizer_of(True)
    config = {"apb": apb_ds.APBConfig(hosts=2), "dense": apb_ds.APBConfig(method="dense")}[method]
    engine = apb_ds.init_inference(model, config)
    texts = [f"The lamp of harbour {number} is lit at dusk. " * (2 + number) + "\n\nWhere?" for number in range(5)]
    sampled, greedy = {"do_sample": True, "temperature": 3.0}, {"do_sample": False}
    found = {}
    for sequences in (1, 2, 8):
        lm = apb_ds.HarnessModel(engine, tokenizer, sequences=sequences)
        prompts = [lm.apply_chat_template([{"role": "user", "content": text}]) for text in texts]
        asked = [
            instance(prompt, {"max_gen_toks": 9 - number, **(sampled if number % 2 else greedy)})
            for number, prompt in enumerate([*prompts, prompts[1]])
        ]
        torch.manual_seed(3)
        lm.cache_hook = mock.Mock()
        answers = lm.generate_until(asked, disable_tqdm=True)
        partial = [call.args for call in lm.cache_hook.add_partial.call_args_list]
        assert sorted(partial, key=str) == sorted(
            [("generate_until", one.args, answer) for one, answer in zip(asked, answers, strict=True)], key=str
        )
        again = lm.generate_until(asked, disable_tqdm=True)
        assert [again[0], again[2], again[4]] == [answers[0], answers[2], answers[4]] and again != answers
        found[sequences] = answers
    assert found[1] == found[2] == found[8] and len(set(found[1])) == 6


def test_short_exact_prompts_share_a_forward(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = apb_ds.init_inference(model, apb_ds.APBConfig(hosts=8))  # prompts this short run exact
    asked = [instance(f"A text.\n\nQuestion {number}?", {"max_gen_toks": 3}) for number in range(4)]
    expected = apb_ds.HarnessModel(engine, tokenizer_of(False), sequences=1).generate_until(asked, disable_tqdm=True)
    monkeypatch.setattr(engine, "prefill", mock.Mock(side_effect=AssertionError))
    together = apb_ds.HarnessModel(engine, tokenizer_of(False), sequences=4)
    assert together.generate_until(asked, disable_tqdm=True) == expected


@pytest.mark.parametrize("sequences", [1, 3, 32])
def test_likelihoods_of_several_contexts(sequences: int, model: Any) -> None:
    """Packs of continuations, of one context and of several; one context is a single token, one choice is repeated."""
    tokenizer = tokenizer_of(False)
    engine = apb_ds.init_inference(model, apb_ds.APBConfig(method="dense"))
    lm = apb_ds.HarnessModel(engine, tokenizer, sequences=sequences)
    contexts = ["A text with some words in it.\n\nA question?", "A", "Another text, of other words.\n\nWhy?"]
    asked = [
        instance(context, choice, kind="loglikelihood")
        for context in contexts
        for choice in (" yes", " no", " perhaps")
    ]
    lm.cache_hook = mock.Mock()
    answers = lm.loglikelihood(asked, disable_tqdm=True)
    theirs = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1).loglikelihood(asked, disable_tqdm=True)
    for (ours, is_greedy), (other, other_greedy) in zip(answers, theirs, strict=True):
        assert ours == pytest.approx(other, abs=1e-3) and is_greedy == other_greedy
    partial = {call.args[1]: call.args[2] for call in lm.cache_hook.add_partial.call_args_list}
    assert partial == {one.args: answer for one, answer in zip(asked, answers, strict=True)}


def test_choices_share_a_prefill(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of(False)
    engine = apb_ds.init_inference(model, apb_ds.APBConfig(hosts=2))
    lm = apb_ds.HarnessModel(engine, tokenizer)
    calls = []
    prefill = engine.prefill
    monkeypatch.setattr(engine, "prefill", lambda *a, **k: calls.append(a) or prefill(*a, **k))
    context = "A text with some words in it.\n\nA question?"
    asked = [instance(context, f" {choice}", kind="loglikelihood") for choice in ("yes", "no", "perhaps")]
    answers = lm.loglikelihood(asked, disable_tqdm=True)
    assert len(answers) == 3 and len(calls) == 1
    assert tokenizer.decode(calls[0][1][0]) == "A question?", "the anchor sees the question but not the choices"


# --- refused input -------------------------------------------------------------------------------------------------


def test_refused(model: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of(False)
    engine = apb_ds.init_inference(model, apb_ds.APBConfig(hosts=2))
    lm = apb_ds.HarnessModel(engine, tokenizer)
    with pytest.raises(NotImplementedError, match="task=fidelity"):
        evaluate(lm, folder, "lamp_rolling", chat=False)
    with pytest.raises(ValueError, match="the prompt is empty"):
        lm.generate_until([instance("", {})], disable_tqdm=True)
    with pytest.raises(ValueError, match="max_position_embeddings=4096"):
        lm.generate_until([instance("a" * 4090, {"max_gen_toks": 10})], disable_tqdm=True)
    with pytest.raises(ValueError, match="sequences=0 must be an integer of at least 1"):
        apb_ds.HarnessModel(engine, tokenizer, sequences=0)
    with pytest.raises(ValueError, match="num_beams=2 is not supported"):
        lm.generate_until([instance("a text", {"num_beams": 2})], disable_tqdm=True)
    monkeypatch.setattr(engine.group, "gather_objects", lambda value: [value, "another"])
    with pytest.raises(ValueError, match="the ranks have built different prompts"):
        lm.generate_until([instance("a text", {})], disable_tqdm=True)


def test_without_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.find_spec("apb_ds.tasks.lm_eval.prompts")
    assert spec is not None and spec.loader is not None
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    with pytest.raises(RuntimeError, match=r"needs lm-evaluation-harness.*pip install -e '\.\[eval\]'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_settings_are_restored(model: Any) -> None:
    config = apb_ds.APBConfig(hosts=2, query_position=1)
    engine = apb_ds.init_inference(model, config)
    lm = apb_ds.HarnessModel(engine, tokenizer_of(False), query_position=5)
    seen = []
    configure = engine.configure
    engine.configure = lambda one: seen.append(one.query_position) or configure(one)
    with pytest.raises(ValueError, match="num_beams"):
        lm.generate_until([instance("A text of words.\n\nA question?", {"num_beams": 2})], disable_tqdm=True)
    assert seen == [5, 1] and engine.apb_config is config, "restored after an error, too"
    assert (lm.rank, lm.world_size) == (0, 1)
