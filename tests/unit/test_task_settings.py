"""Settings of tasks whose text the user gives: required values, refused ones, and where answers go."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from apb_ds.tasks import build_task_config
from apb_ds.tasks.answering import AnsweringConfig
from apb_ds.tasks.batch import BatchConfig
from apb_ds.tasks.chat import ChatConfig
from apb_ds.tasks.prompt import PromptConfig
from tests.tiny_checkpoint import byte_tokenizer

GREEDY = {"do_sample": False}


@pytest.mark.parametrize(
    ("values", "arguments"),
    [
        ({}, GREEDY),
        ({"do_sample": False}, GREEDY),
        ({"max_new_tokens": 1}, GREEDY),
        ({"do_sample": True}, {"do_sample": True}),
        ({"temperature": 0.7}, {"do_sample": True, "temperature": 0.7}),
        ({"temperature": 2}, {"do_sample": True, "temperature": 2}),
        ({"top_p": 0.9}, {"do_sample": True, "top_p": 0.9}),
        ({"top_p": 0}, {"do_sample": True, "top_p": 0}),
        ({"top_k": 5}, {"do_sample": True, "top_k": 5}),
        ({"top_k": 0}, {"do_sample": True, "top_k": 0}),
        ({"min_p": 1}, {"do_sample": True, "min_p": 1}),
        ({"do_sample": True, "min_p": 0.1}, {"do_sample": True, "min_p": 0.1}),
        ({"repetition_penalty": 1.3}, {**GREEDY, "repetition_penalty": 1.3}),
        ({"do_sample": False, "repetition_penalty": 0.5}, {**GREEDY, "repetition_penalty": 0.5}),
        ({"stop": "\n"}, {**GREEDY, "stop_strings": ["\n"]}),
        ({"stop": ["END", " "]}, {**GREEDY, "stop_strings": ["END", " "]}),
        ({"stop": ["42", "\ufeffx"]}, {**GREEDY, "stop_strings": ["42", "x"]}),
    ],
)
def test_arguments_of_generate(values: dict[str, Any], arguments: dict[str, Any]) -> None:
    assert AnsweringConfig(**values).generate_arguments() == arguments


@pytest.mark.parametrize(
    ("field", "values", "allowed"),
    [
        ("max_new_tokens", [0, -1, 1.5, "8", True, None], "an integer of at least 1"),
        ("do_sample", [0, 1, "true", "maybe"], "true or false"),
        ("temperature", [0, -0.5, "hot", True, float("nan"), float("inf")], "a number above 0; leave it out"),
        ("top_p", [-0.1, 1.1, "0.5", True, float("nan")], r"a number in \[0, 1\]"),
        ("min_p", [-0.1, 2, "x", False], r"a number in \[0, 1\]"),
        ("top_k", [-1, 2.0, "5", True], "an integer of at least 0"),
        ("repetition_penalty", [0, -1, "x", True, float("nan")], "a number above 0; 1 has no effect"),
        ("stop", ["", [], ["a", ""], [None], [["a"]], {"a": "b"}], "a text or a list of texts, none of them"),
    ],
)
def test_value_out_of_range(field: str, values: list[object], allowed: str) -> None:
    for value in values:
        with pytest.raises(ValueError, match=rf"^task\.{field}=.* must be {allowed}"):
            AnsweringConfig(**{field: value})


@pytest.mark.parametrize("key", ["temperature", "top_p", "top_k", "min_p"])
def test_greedy_conflicts_with_sampling(key: str) -> None:
    with pytest.raises(ValueError, match=rf"task.do_sample=false takes the likeliest tokens, but task.{key}=1"):
        AnsweringConfig(do_sample=False, **{key: 1})


def test_every_task_answers_with_the_same_keys() -> None:
    required = {"prompt": {"document": "d", "query": "q"}, "chat": {"document": "d"}, "batch": {"input": "i"}}
    for name, given in required.items():
        config = build_task_config({"name": name, **given, "temperature": 0.5, "stop": "x", "top_k": None})
        assert isinstance(config, AnsweringConfig)
        assert config.max_new_tokens == 128
        assert config.generate_arguments() == {"do_sample": True, "temperature": 0.5, "stop_strings": ["x"]}
        with pytest.raises(ValueError, match=r"task.max_new_tokens=0"):
            build_task_config({"name": name, **given, "max_new_tokens": 0})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "prompt"}, "task.document='' is empty"),
        ({"name": "prompt", "document": None, "query": "q"}, "task.document='' is empty"),
        ({"name": "prompt", "document": "d"}, "task.query='' is empty"),
        ({"name": "prompt", "document": "d", "query": " "}, "task.query=' ' is empty"),
        ({"name": "prompt", "document": "d", "query": ["a", "b"]}, "task.query=.* is not a text"),
        ({"name": "prompt", "document": "d", "query": 1.10}, "task.query=1.1 is a number, not a text; quote it"),
        ({"name": "chat", "document": True}, "task.document=true is true or false, not a text; quote it"),
        ({"name": "prompt", "document": "-", "query": "-"}, "both -; only one can come from standard input"),
        ({"name": "prompt", "document": "d", "query": "q", "stream": 1}, "task.stream=1 must be true or false"),
        ({"name": "prompt", "document": "d", "querry": "q"}, "task key='querry' is not known.*'query'"),
        ({"name": "chat"}, "task.document='' is empty"),
        ({"name": "chat", "document": "-"}, "task.document=-: the questions come from standard input"),
        ({"name": "chat", "document": "d", "query": "-"}, "task.query=-: the questions come from standard input"),
        ({"name": "chat", "document": "d", "query": ""}, "task.query='' is empty"),
        ({"name": "chat", "document": "d", "stream": "yes"}, "task.stream='yes' must be true or false"),
        ({"name": "chat", "document": "d", "turn_tokens": 0}, "task.turn_tokens=0 must be an integer of at least 1"),
        ({"name": "lm_eval"}, "task.tasks is missing: name tasks"),
        ({"name": "lm_eval", "tasks": ["a", "a"]}, "task.tasks=.*none of them twice"),
        ({"name": "lm_eval", "tasks": [5]}, "task.tasks=.* must be a name"),
        ({"name": "lm_eval", "tasks": "a", "num_fewshot": -1}, "task.num_fewshot=-1 must be an integer of at least 0"),
        ({"name": "lm_eval", "tasks": "a", "max_new_tokens": 0}, "task.max_new_tokens=0 must be"),
        ({"name": "lm_eval", "tasks": "a", "split": "word"}, "task.split='word' is not known"),
        ({"name": "lm_eval", "tasks": "a", "query_start": 5}, "task.query_start=5 must be a text"),
        ({"name": "lm_eval", "tasks": "a", "metadata": [1]}, "task.metadata=.* must be a mapping"),
        (
            {"name": "lm_eval", "tasks": "a", "apply_chat_template": "yes"},
            "task.apply_chat_template='yes' must be true",
        ),
        (
            {"name": "lm_eval", "tasks": "a", "apply_chat_template": False, "template": {"thinking": True}},
            "task.template=.*task.apply_chat_template=false",
        ),
        ({"name": "passkey", "system": "-"}, "task.system=-.*@FILE"),
        ({"name": "synthetic", "system": " "}, "task.system=' ' is empty"),
        ({"name": "ruler", "template": [1]}, r"task.template=\[1\] must be a mapping"),
        ({"name": "infinitebench", "template": {"tokenize": True}}, "task.template.tokenize"),
        ({"name": "batch"}, "task.input='' is missing: give a JSONL file"),
        ({"name": "batch", "input": 5}, "task.input=5 is missing"),
        ({"name": "batch", "input": "i", "output": ""}, "task.output='' must be the name of a file"),
        ({"name": "batch", "input": "i", "output": 5}, "task.output=5 must be the name of a file"),
        ({"name": "batch", "input": "i", "reuse_prefill": 1}, "task.reuse_prefill=1 must be true or false"),
        ({"name": "batch", "input": "i", "overwrite": "no"}, "task.overwrite='no' must be true or false"),
        ({"name": "batch", "input": "i", "output": "~nobody-at-all/o"}, "task.output='~nobody-at-all/o'.*no home"),
    ],
)
def test_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_task_config(values)


@pytest.mark.parametrize("name", ["passkey", "synthetic"])
def test_made_up_documents_follow_the_system_prompt(name: str, tmp_path: Path) -> None:
    (tmp_path / "system.txt").write_text("Be brief.")
    config = build_task_config({"name": name, "num_tokens": 900, "system": f"@{tmp_path}/system.txt"})
    tokenizer = byte_tokenizer()
    (sample,) = config.samples(config.chat_tokenizer(tokenizer), 0, 0)
    assert tokenizer.decode(sample.document_ids[0]).startswith("<s><|system|>Be brief.</s><|user|>")
    assert sample.num_document <= 900


def test_defaults() -> None:
    prompt = PromptConfig(document="d", query="-")
    assert (prompt.stream, prompt.max_new_tokens) == (False, 128)
    chat = ChatConfig(document="d")
    assert (chat.query, chat.stream, chat.turn_tokens) == (None, True, 4096)
    batch = BatchConfig(input="i")
    assert (batch.output, batch.reuse_prefill, batch.overwrite, batch.sequences) == (None, True, False, 32)
    with pytest.raises(ValueError, match=r"task.sequences=0 must be an integer of at least 1"):
        BatchConfig(input="i", sequences=0)


@pytest.mark.parametrize("task", ["prompt", "chat"])
@pytest.mark.parametrize("field", ["document", "query"])
def test_sources_are_checked_before_anything_is_loaded(task: str, field: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    values = {"name": task, "document": "d", "query": "q", field: f"@{path}"}
    config = build_task_config(values)
    with pytest.raises(ValueError, match=rf"task.{field}='@.*there is no file"):
        config.check_sources()
    path.write_text("text")
    config.check_sources()


def test_chat_needs_no_first_question() -> None:
    ChatConfig(document="d").check_sources()


def test_sample_of_a_prompt(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfThe sky is blue.")
    tokenizer = byte_tokenizer()
    config = PromptConfig(document=f"@{path}", query="@@who?", max_new_tokens=9, top_k=3, stop="x")
    (sample,) = config.samples(tokenizer, len(tokenizer), 0)
    assert tokenizer.decode(sample.document_ids[0]) == "<s><|user|>The sky is blue.</s>"
    assert tokenizer.decode(sample.query_ids[0]) == "<|user|>@who?</s><|assistant|>"
    assert (sample.query_position, sample.max_new_tokens) == (2, 9)
    assert sample.generate == {"do_sample": True, "top_k": 3, "stop_strings": ["x"]}
    assert sample.ground_truth is None and not sample.random_ids


def test_prompt_without_a_tokenizer() -> None:
    config = PromptConfig(document="d", query="q")
    with pytest.raises(ValueError, match=r"task=prompt needs a tokenizer.*set model.tokenizer"):
        next(config.samples(None, 100, 0))


# --- a batch's files ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "run_dir", "expected"),
    [
        ({"input": "a/q.jsonl"}, None, "a/q.answers.jsonl"),
        ({"input": "a/q.v2.jsonl"}, None, "a/q.v2.answers.jsonl"),
        ({"input": "a/q.json"}, None, "a/q.json.answers.jsonl"),
        ({"input": "questions"}, None, "questions.answers.jsonl"),
        ({"input": "~/q.jsonl"}, None, "/home/x/q.answers.jsonl"),
        ({"input": "a/q.jsonl"}, "runs/0", "runs/0/answers.jsonl"),
        ({"input": "a/q.jsonl", "output": "b/out.jsonl"}, None, "b/out.jsonl"),
        ({"input": "a/q.jsonl", "output": "b/out.jsonl"}, "runs/0", "b/out.jsonl"),
        ({"input": "a/q.jsonl", "output": "~/out.jsonl"}, "runs/0", "/home/x/out.jsonl"),
    ],
)
def test_where_answers_go(
    values: dict[str, str], run_dir: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/x")
    assert BatchConfig(**values).output_path(None if run_dir is None else Path(run_dir)) == Path(expected)


@pytest.mark.parametrize("name", ["q.jsonl", "./q.jsonl", "below/../q.jsonl", "~/q.jsonl", "link.jsonl"])
def test_output_that_is_the_input(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "below").mkdir()
    (tmp_path / "q.jsonl").write_text("")
    os.symlink("q.jsonl", tmp_path / "link.jsonl")
    with pytest.raises(ValueError, match=r"task.output=.* is the input; give another file"):
        BatchConfig(input="q.jsonl", output=name)
    BatchConfig(input="q.jsonl", output="below/q.jsonl")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.jsonl", "does not exist; name a JSONL file"),
        (".", "is a directory; name a JSONL file"),
        ("pipe", "is not a file; name a JSONL file"),
        ("x" * 300, r"cannot be read \(File name too long\); name a JSONL file"),
    ],
)
def test_input_that_cannot_be_used(name: str, message: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match=rf"task.input='{tmp_path}.*{message}"):
        BatchConfig(input=str(tmp_path / name)).check_sources()


def test_input_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "q.jsonl").write_text("")
    monkeypatch.setenv("HOME", str(tmp_path))
    BatchConfig(input="~/q.jsonl").check_sources()
    with pytest.raises(ValueError, match=r"task.input='~nobody-at-all/q'.*no home directory"):
        BatchConfig(input="~nobody-at-all/q").check_sources()
