"""Requests of OpenAI's API: every field is honoured, accepted where ignoring it changes nothing, or refused by name."""

from __future__ import annotations

import json
from typing import Any

import pytest

from apb_ds.serving.errors import ApiError
from apb_ds.serving.protocol import ChatRequest, CompletionRequest, read_request
from apb_ds.serving.requests import Message, Options

USER = {"role": "user", "content": "Hello"}
# An answer's message as OpenAI's clients send it back.
ANSWER = {
    "role": "assistant",
    "content": "Hi",
    "refusal": None,
    "tool_calls": None,
    "annotations": [],
    "audio": None,
    "function_call": None,
}


def chat(**fields: Any) -> ChatRequest:
    return read_request(ChatRequest, {"model": "tiny", "messages": [USER], **fields})


def completion(**fields: Any) -> CompletionRequest:
    return read_request(CompletionRequest, {"model": "tiny", "prompt": "Once", **fields})


def refusal(make: Any, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        make(**fields)
    assert caught.value.status == 400
    assert caught.value.kind == "invalid_request_error"
    return caught.value


# --- honoured --------------------------------------------------------------------------------------------------------


def test_defaults_are_those_of_the_api() -> None:
    assert chat().options == Options()
    assert completion().options == Options(max_new_tokens=16, continues=True)
    assert not chat().stream and not chat().includes_usage


def test_nulls_are_defaults() -> None:
    given = chat()
    required = ("model", "messages")
    nulls = {name: None for name in ChatRequest.model_fields if name not in required}
    assert chat(**nulls).options == given.options
    nulls = {name: None for name in CompletionRequest.model_fields if name not in ("model", "prompt")}
    assert completion(**nulls).options == completion().options


@pytest.mark.parametrize(
    ("fields", "option", "value"),
    [
        ({"max_tokens": 5}, "max_new_tokens", 5),
        ({"temperature": 0}, "temperature", 0.0),
        ({"temperature": 2}, "temperature", 2.0),
        ({"top_p": 0.25}, "top_p", 0.25),
        ({"frequency_penalty": -2}, "frequency_penalty", -2.0),
        ({"presence_penalty": 1.5}, "presence_penalty", 1.5),
        ({"seed": -1}, "seed", -1),
        ({"seed": 0}, "seed", 0),
        ({"stop": "END"}, "stop", ("END",)),
        ({"stop": ["a", "b", "c", "d"]}, "stop", ("a", "b", "c", "d")),
        ({"stop": []}, "stop", ()),
        ({"logit_bias": {"50256": -100, "7": 1.5}}, "logit_bias", {50256: -100, 7: 1.5}),
        ({"logit_bias": {}}, "logit_bias", {}),
        ({"ignore_eos": True}, "ignore_eos", True),
    ],
)
@pytest.mark.parametrize("make", [chat, completion])
def test_option_reaches_the_engine(make: Any, fields: dict[str, Any], option: str, value: Any) -> None:
    assert getattr(make(**fields).options, option) == value


@pytest.mark.parametrize(
    ("fields", "top_logprobs"),
    [({}, None), ({"logprobs": False}, None), ({"logprobs": True}, 0), ({"logprobs": True, "top_logprobs": 20}, 20)],
)
def test_chat_logprobs(fields: dict[str, Any], top_logprobs: int | None) -> None:
    assert chat(**fields).options.top_logprobs == top_logprobs


def test_completion_logprobs() -> None:
    assert completion(logprobs=0).options.top_logprobs == 0
    assert completion(logprobs=5).options.top_logprobs == 5


def test_two_names_of_max_tokens() -> None:
    assert chat(max_completion_tokens=7).options.max_new_tokens == 7
    assert chat(max_completion_tokens=7, max_tokens=7).options.max_new_tokens == 7
    error = refusal(chat, max_completion_tokens=7, max_tokens=8)
    assert error.param == "max_tokens" and "max_completion_tokens" in error.message
    assert refusal(completion, max_completion_tokens=7).param == "max_completion_tokens"


def test_usage_of_streams() -> None:
    assert chat(stream=True, stream_options={"include_usage": True}).includes_usage
    assert not chat(stream=True, stream_options={"include_usage": False, "include_obfuscation": True}).includes_usage


def test_messages() -> None:
    parts = [{"type": "text", "text": "document"}, {"type": "text", "text": "question"}]
    asked = chat(
        messages=[
            {"role": "system", "content": "Be brief."},
            {"role": "developer", "content": "Be kind."},
            {"role": "user", "content": parts, "name": "Ada"},
            ANSWER,
            USER,
        ]
    )
    assert [one.message for one in asked.messages] == [
        Message("system", ("Be brief.",)),
        Message("system", ("Be kind.",)),
        Message("user", ("document", "question")),
        Message("assistant", ("Hi",)),
        Message("user", ("Hello",)),
    ]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("a", "a"), ([1, 2], [1, 2]), (["a"], "a"), ([[1, 2]], [1, 2]), ("", ""), ([], []), ([[]], [])],
)
def test_prompt_forms(prompt: Any, expected: Any) -> None:
    assert completion(prompt=prompt).text == expected


# --- accepted --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "u"},
        {"metadata": {"a": "b"}},
        {"service_tier": "auto"},
        {"safety_identifier": "x"},
        {"prompt_cache_key": "x"},
        {"prompt_cache_retention": "24h"},
        {"n": 1},
        {"best_of": 1},
        {"store": False},
        {"echo": False},
        {"suffix": ""},
        {"tools": []},
        {"tool_choice": "auto"},
        {"tool_choice": "none"},
        {"parallel_tool_calls": True},
        {"functions": []},
        {"function_call": "none"},
        {"modalities": ["text"]},
        {"response_format": {"type": "text"}},
        {"audio": None, "prediction": None, "reasoning_effort": None, "verbosity": None, "web_search_options": None},
    ],
)
def test_what_changes_nothing_is_accepted(fields: dict[str, Any]) -> None:
    assert chat(**fields).options == chat().options


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("n", 2),
        ("n", [[1]]),
        ("best_of", 3),
        ("store", True),
        ("echo", True),
        ("suffix", "end"),
        ("tools", [{"type": "function"}]),
        ("tool_choice", "required"),
        ("tool_choice", {"type": "function"}),
        ("functions", [{}]),
        ("function_call", {"name": "f"}),
        ("modalities", ["text", "audio"]),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {}}),
        ("audio", {"voice": "x"}),
        ("prediction", {"type": "content"}),
        ("reasoning_effort", "high"),
        ("verbosity", "low"),
        ("web_search_options", {}),
        ("moderation", {}),
    ],
)
def test_what_cannot_be_done_is_refused(field: str, value: Any) -> None:
    error = refusal(chat, **{field: value})
    assert error.param == field
    assert error.code == "unsupported_value"
    assert f"'{field}'" in error.message and "not supported" in error.message


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("response_format", {"type": "json_object"}, '{"type": "json_object"} is not supported'),
        ("response_format", {"type": "json_object"}, 'leave it out, or give {"type": "text"}.'),
        ("tools", [{"type": "function"}], '[{"type": "function"}] is not supported'),
        ("tool_choice", "required", '"required" is not supported by this server; leave it out, or give "none", or'),
        ("n", 2, "2 is not supported by this server; leave it out, or give 1."),
        ("audio", {"voice": "x"}, '{"voice": "x"} is not supported by this server; leave it out.'),
    ],
)
def test_refusals_show_what_was_given_and_name_what_is_accepted(field: str, value: Any, said: str) -> None:
    assert said in refusal(chat, **{field: value}).message


@pytest.mark.parametrize("make", [chat, completion])
@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("model", [None, 5, ["tiny"]]),
        ("max_tokens", [0, -1, True, 1.0, "5", [5]]),
        ("temperature", [-0.1, 2.1, "1", True, float("nan"), float("inf"), []]),
        ("top_p", [0, 1.1, "1", float("nan")]),
        ("frequency_penalty", [-2.1, 2.1, "0"]),
        ("presence_penalty", [-2.1, 2.1, {}]),
        ("seed", [1.5, "1", 2**63, -(2**63) - 1, True]),
        ("stop", [5, "", [""], ["a", ""], list("abcde"), {"a": 1}]),
        ("logit_bias", [[1], "1", {"a": 1}, {"-1": 1}, {"1": "x"}, {"1": 101}, {"1": True}, {"1" * 5000: 1}, {"٣": 1}]),
        ("logit_bias", [{"1": float("nan")}, {"1": None}]),
        ("stream", ["true", 1]),
        ("stream_options", [5, {"include_usage": True}, []]),
        ("ignore_eos", ["no", 0]),
        ("logprobs", ["yes", 1.5, -1]),
    ],
)
def test_wrong_values_are_refused(make: Any, field: str, values: list[Any]) -> None:
    for value in values:
        error = refusal(make, **{field: value})
        assert error.param == field, value
        assert error.message.startswith(f"Invalid value for '{field}': "), error.message
        assert error.code == "invalid_value"


@pytest.mark.parametrize(
    ("make", "fields", "param"),
    [
        (chat, {"top_logprobs": 2}, "top_logprobs"),
        (chat, {"top_logprobs": 2, "logprobs": False}, "top_logprobs"),
        (chat, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        (chat, {"logprobs": 1}, "logprobs"),
        (completion, {"logprobs": True}, "logprobs"),
        (completion, {"logprobs": 6}, "logprobs"),
        (chat, {"stop": ["a", 5]}, "stop[1]"),
        (chat, {"stream": False, "stream_options": {}}, "stream_options"),
        (chat, {"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        (completion, {"prompt": ["a", "b"]}, "prompt"),
        (completion, {"prompt": [[1], [2]]}, "prompt"),
        (completion, {"prompt": None}, "prompt"),
        (completion, {"prompt": 5}, "prompt"),
        (completion, {"prompt": [True]}, "prompt[0]"),
        (completion, {"prompt": [1, "a"]}, "prompt[1]"),
        (completion, {"prompt": [[1, None]]}, "prompt[0][1]"),
    ],
)
def test_wrong_combinations_and_places_are_refused(make: Any, fields: dict[str, Any], param: str) -> None:
    error = refusal(make, **fields)
    assert error.param == param
    assert error.message.startswith(f"Invalid value for '{param}': ")


@pytest.mark.parametrize(
    ("messages", "param", "said"),
    [
        (None, "messages", "valid list"),
        ("Hello", "messages", "valid list"),
        ([], "messages", "at least 1"),
        (["Hello"], "messages[0]", "an object"),
        ([USER, {"role": "tool", "content": "a"}], "messages[1].role", "'assistant'"),
        ([{"role": "user"}], "messages[0].content", "Missing"),
        ([{"content": "a"}], "messages[0].role", "Missing"),
        ([{"role": "user", "content": None}], "messages[0].content", "a valid string, or a valid list"),
        ([{"role": "user", "content": 5}], "messages[0].content", "a valid string, or a valid list"),
        ([{"role": "user", "content": []}], "messages[0].content", "no parts"),
        ([{"role": "user", "content": ["a"]}], "messages[0].content[0]", "an object"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "messages[0].content[0].type",
            "should be 'text'",
        ),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text", "Missing"),
        ([{"role": "user", "content": [{"type": "text", "text": 5}]}], "messages[0].content[0].text", "valid string"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a", "extra": 1}]}],
            "messages[0].content[0].extra",
            "Unrecognized",
        ),
        ([USER, {**ANSWER, "tool_calls": [{"id": "1"}]}], "messages[1].tool_calls", "Unrecognized"),
        (
            [USER, {**ANSWER, "content": None, "tool_calls": [{"id": "1"}]}],
            "messages[1].tool_calls",
            "Unrecognized",
        ),
        ([USER, {**ANSWER, "refusal": "no"}], "messages[1].refusal", "Unrecognized"),
        ([{**USER, "name": 5}], "messages[0].name", "valid string"),
    ],
)
def test_wrong_messages_are_refused(messages: Any, param: str, said: str) -> None:
    error = refusal(chat, messages=messages)
    assert error.param == param
    assert said in error.message and param in error.message


@pytest.mark.parametrize(
    ("kind", "values", "field"),
    [
        (ChatRequest, {"messages": [USER]}, "model"),
        (ChatRequest, {"model": "tiny"}, "messages"),
        (CompletionRequest, {"model": "tiny"}, "prompt"),
        (CompletionRequest, {"prompt": "a"}, "model"),
    ],
)
def test_missing_fields_are_named(kind: Any, values: dict[str, Any], field: str) -> None:
    with pytest.raises(ApiError) as caught:
        read_request(kind, values)
    assert caught.value.message == f"Missing required parameter: '{field}'."
    assert (caught.value.status, caught.value.param) == (400, field)
    assert caught.value.code == "missing_required_parameter"


@pytest.mark.parametrize(
    ("make", "field"), [(chat, "top_k"), (chat, "prompt"), (completion, "messages"), (completion, "top_logprobs")]
)
def test_unknown_fields_are_refused(make: Any, field: str) -> None:
    error = refusal(make, **{field: 1})
    assert error.message == f"Unrecognized request argument supplied: {field}"
    assert (error.param, error.code) == (field, "unknown_parameter")


@pytest.mark.parametrize("body", [[], "text", None, 5, True])
def test_body_must_be_an_object(body: Any) -> None:
    with pytest.raises(ApiError, match="JSON object") as caught:
        read_request(ChatRequest, body)
    assert (caught.value.status, caught.value.param) == (400, None)


@pytest.mark.parametrize(
    ("make", "fields"),
    [
        (chat, {"x" * 100_000: 1}),
        (chat, {"suffix": "x" * 100_000}),
        (chat, {"n": ["x" * 100_000]}),
        (chat, {"messages": [{**USER, "x" * 100_000: 1}]}),
        (chat, {"model": ["x" * 100_000]}),
        (completion, {"prompt": [1.5] * 100_000}),
        (completion, {"prompt": [["x"]] * 100_000}),
        (chat, {"messages": ["x"] * 100_000}),
        (chat, {"logit_bias": {str(number): "x" for number in range(100_000)}}),
        (chat, {"stop": [5] * 100_000}),
        (chat, {"n": json.loads("[" * 900 + "]" * 900)}),
    ],
)
def test_refusals_of_large_bodies_are_short(make: Any, fields: dict[str, Any]) -> None:
    assert len(json.dumps(refusal(make, **fields).body)) < 500
