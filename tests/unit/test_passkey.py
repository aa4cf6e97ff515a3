"""Prompts: where chat templates put the boundary between document and query, and the pass key task."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from apb_ds.tasks import PasskeyConfig, Sample, build_task_config
from apb_ds.tasks.passkey import ANSWER_PREFIX, FILLER, QUERY, TASK
from tests.split_prompt import split_prompt
from tests.unit.smollm2 import smollm2_tokenizer

TURNS = "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}\n{% endfor %}"
OPENED = "{% if add_generation_prompt %}[assistant] {% endif %}"
ALTERNATING = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% endfor %}"
)


class ByteTokenizer:
    """A tokenizer without files: one token per byte, 256 for the beginning of a sequence."""

    bos_token_id: int | None = 256

    def __init__(self, chat_template: str | None = None) -> None:
        self.chat_template = chat_template

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": list(text.encode())}

    def decode(self, ids: list[int]) -> str:
        return bytes(token for token in ids if token < 256).decode()

    def apply_chat_template(
        self, messages: list[dict[str, str]], *, tokenize: bool, add_generation_prompt: bool
    ) -> str:
        from jinja2 import Environment
        from jinja2.exceptions import TemplateError

        def refuse(message: str) -> None:
            raise TemplateError(message)

        template = Environment().from_string(self.chat_template or "")
        return template.render(messages=messages, add_generation_prompt=add_generation_prompt, raise_exception=refuse)


def only_sample(config: PasskeyConfig, tokenizer: Any | None, seed: int = 0) -> Sample:
    (sample,) = config.samples(tokenizer, 100, seed)
    return sample


def test_two_user_turns() -> None:
    tokenizer = ByteTokenizer(TURNS + OPENED)
    prompt = split_prompt(tokenizer, "long text", "what?", "it is ")
    assert tokenizer.decode(prompt.document_ids) == "[user] long text\n"
    assert tokenizer.decode(prompt.query_ids) == "[user] what?\n[assistant] it is "
    assert prompt.query_position == len("[user] ")


def test_document_does_not_depend_on_the_query() -> None:
    for template in (None, TURNS + OPENED, ALTERNATING + TURNS + OPENED):
        tokenizer = ByteTokenizer(template)
        first, second = (split_prompt(tokenizer, "long text", query) for query in ("what?", "why not?"))
        assert first.document_ids == second.document_ids
        assert first.query_ids != second.query_ids


def test_template_that_refuses_two_user_turns_gets_one() -> None:
    tokenizer = ByteTokenizer(ALTERNATING + TURNS + OPENED)
    prompt = split_prompt(tokenizer, "long text", "what?", "it is ")
    assert tokenizer.decode(prompt.document_ids) == "[user] long text"
    assert tokenizer.decode(prompt.query_ids) == "\n\nwhat?\n[assistant] it is "


def test_without_a_template_it_is_bos_and_text() -> None:
    tokenizer = ByteTokenizer()
    prompt = split_prompt(tokenizer, "long text", "what?", "it is ")
    assert prompt.document_ids[0] == 256
    assert tokenizer.decode(prompt.document_ids) == "long text"
    assert tokenizer.decode(prompt.query_ids) == "\n\nwhat?\nit is "
    assert prompt.query_position == 1
    tokenizer.bos_token_id = None
    assert split_prompt(tokenizer, "long text", "what?").query_position == 0


def test_template_without_user_text_is_refused() -> None:
    with pytest.raises(ValueError, match="chat template omits"):
        split_prompt(ByteTokenizer("hello"), "long text", "what?")


@pytest.mark.parametrize("num_tokens", [400, 777, 5000])
@pytest.mark.parametrize("depth", [0, 0.5, 1])
def test_as_many_fillers_as_fit(num_tokens: int, depth: float) -> None:
    tokenizer = ByteTokenizer(TURNS + OPENED)
    config = PasskeyConfig(num_tokens=num_tokens, depth=depth, digits="4711")
    sample = only_sample(config, tokenizer)
    length = sample.document_ids.shape[1]
    assert num_tokens - len(FILLER) < length <= num_tokens
    text = tokenizer.decode(sample.document_ids[0].tolist())
    count, before = text.count(FILLER.strip()), text[: text.index("The pass key is 4711")].count(FILLER.strip())
    assert before == int(depth * count)


def test_too_short_for_the_task() -> None:
    with pytest.raises(ValueError, match=r"task.num_tokens=20 cannot hold the task.*raise task.num_tokens"):
        only_sample(PasskeyConfig(num_tokens=20), ByteTokenizer())


def test_random_ids_without_a_tokenizer() -> None:
    config = PasskeyConfig(num_tokens=300)
    sample, again, other = (only_sample(config, None, seed) for seed in (1, 1, 2))
    assert sample.document_ids.shape == (1, 300)
    assert sample.document_ids.dtype == torch.int64
    assert int(sample.document_ids.max()) < 100
    assert sample.random_ids and sample.ground_truth is None
    assert torch.equal(sample.document_ids, again.document_ids)
    assert not torch.equal(sample.document_ids, other.document_ids)


@pytest.mark.parametrize("digits", [12345, "12345"])
def test_digits_may_arrive_as_a_number(digits: int | str) -> None:
    config = build_task_config({"name": "passkey", "digits": digits})
    assert isinstance(config, PasskeyConfig)
    assert config.digits == "12345"


def test_seed_example_to_the_token() -> None:
    tokenizer = smollm2_tokenizer()
    config = PasskeyConfig()
    sample = only_sample(config, tokenizer)
    assert sample.document_ids.shape == (1, 7690)
    assert sample.query_position == 24
    assert sample.ground_truth == "688435772345"
    needle = "The pass key is 688435772345. Remember it. The pass key is 688435772345. "
    document = tokenizer.decode(sample.document_ids[0])
    assert TASK + FILLER * 126 + needle + FILLER * 254 in document
    header = tokenizer.decode(sample.document_ids[0, :24])
    assert document.index(TASK) == len(header)
    turn = f"<|im_start|>user\n{QUERY}<|im_end|>\n<|im_start|>assistant\n{ANSWER_PREFIX}"
    assert tokenizer.decode(sample.query_ids[0]) == turn
