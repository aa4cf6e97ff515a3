"""Documents, queries and further turns as ids, with chat templates like those of real models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch

from apb_ds.tasks.prompts import (
    encode,
    encode_chat,
    encode_document,
    encode_embedded,
    encode_next_turn,
    encode_query,
    encode_turn,
)
from tests.split_prompt import split_prompt
from tests.tiny_checkpoint import byte_tokenizer
from tests.unit.smollm2 import smollm2_tokenizer
from tests.unit.test_passkey import ByteTokenizer

DOCUMENT, QUERY, ANSWER, NEXT = "The sky is blue.\n\nÄpfel are red.", "Which colour?", "It is blue", "And apples?"

REFUSE_TWO = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}"
    "{% endif %}{% endfor %}"
)
CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are helpful.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for m in messages %}{% set content = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}" + REFUSE_TWO + "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '[INST] ' + m['content'] + ' [/INST]' }}{% else %}{{ m['content'] + eos_token }}{% endif %}{% endfor %}"
)
LLAMA2 = (
    REFUSE_TWO + "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + m['content'] | trim + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}" + REFUSE_TWO + "{% for m in messages %}"
    "{% set role = 'model' if m['role'] == 'assistant' else m['role'] %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# Thoughts are kept in the last answer, and removed from all others.
QWEN3 = (
    "{% set ns = namespace(last=0) %}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
    "{% if loop.index0 > ns.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m['content'].split('</think>')[-1].lstrip('\n') }}{% else %}{{ m['content'] }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Roles are plain words: no token ends a turn.
WORDS = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """A template, and what it should render for `DOCUMENT` and `QUERY`.

    Attributes
    ----------
    special : tokens of its own, besides <s> and </s>
    header, document, query : texts; the document's begins with the header
    end : the token that closes an answer, or None
    num_bos : in the document
    """

    template: str
    special: tuple[str, ...]
    header: str
    document: str
    query: str
    end: str | None
    num_bos: int = 0
    one_turn: bool = False

    def tokenizer(self) -> Any:
        tokenizer = byte_tokenizer(template=self.template)
        if self.special:
            tokenizer.add_special_tokens({"additional_special_tokens": list(self.special)})
        return tokenizer

    def asked(self, document: str = DOCUMENT, query: str = QUERY) -> list[dict[str, str]]:
        contents = [f"{document}\n\n{query}"] if self.one_turn else [document, query]
        return [{"role": "user", "content": content} for content in contents]


def chatml(header: str, template: str) -> Shape:
    document = f"{header}{DOCUMENT}<|im_end|>\n"
    query = f"<|im_start|>user\n{QUERY}<|im_end|>\n<|im_start|>assistant\n"
    return Shape(template, ("<|im_start|>", "<|im_end|>"), header, document, query, "<|im_end|>")


def llama3(text: str, role: str = "user") -> str:
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n{text}"


SHAPES = {
    "chatml": chatml("<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\n", CHATML),
    "qwen3": chatml("<|im_start|>user\n", QWEN3),
    "llama3": Shape(
        LLAMA3,
        ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        f"<s>{llama3('')}",
        f"<s>{llama3(DOCUMENT)}<|eot_id|>",
        f"{llama3(QUERY)}<|eot_id|>{llama3('', 'assistant')}",
        "<|eot_id|>",
        num_bos=1,
    ),
    "mistral": Shape(
        MISTRAL,
        ("[INST]", "[/INST]"),
        "<s>[INST] ",
        f"<s>[INST] {DOCUMENT}",
        f"\n\n{QUERY} [/INST]",
        "</s>",
        num_bos=1,
        one_turn=True,
    ),
    "gemma": Shape(
        GEMMA,
        ("<start_of_turn>", "<end_of_turn>"),
        "<s><start_of_turn>user\n",
        f"<s><start_of_turn>user\n{DOCUMENT}",
        f"\n\n{QUERY}<end_of_turn>\n<start_of_turn>model\n",
        "<end_of_turn>",
        num_bos=1,
        one_turn=True,
    ),
    "phi3": Shape(
        PHI3,
        ("<|user|>", "<|assistant|>", "<|end|>"),
        "<|user|>\n",
        f"<|user|>\n{DOCUMENT}",
        f"\n\n{QUERY}<|end|>\n<|assistant|>\n",
        "<|end|>",
        one_turn=True,
    ),
    "words": Shape(WORDS, (), "user: ", f"user: {DOCUMENT}\n", f"user: {QUERY}\nassistant: ", None),
}


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> Shape:
    return SHAPES[request.param]


def rendered_ids(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Return the ids of a whole conversation, with the next answer opened, as transformers makes them."""
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"])


def test_document_and_query_are_the_rendered_conversation(shape: Shape) -> None:
    tokenizer = shape.tokenizer()
    prompt = split_prompt(tokenizer, DOCUMENT, QUERY)
    assert tokenizer.decode(prompt.document_ids) == shape.document
    assert tokenizer.decode(prompt.query_ids) == shape.query
    assert prompt.document_ids + prompt.query_ids == rendered_ids(tokenizer, shape.asked())


def test_query_position_is_where_the_users_text_begins(shape: Shape) -> None:
    tokenizer = shape.tokenizer()
    document = encode_document(tokenizer, DOCUMENT)
    assert tokenizer.decode(document.ids[: document.query_position]) == shape.header
    assert tokenizer.decode(document.ids[document.query_position :]).startswith(DOCUMENT)


def test_as_many_bos_as_the_template_writes(shape: Shape) -> None:
    tokenizer = shape.tokenizer()
    prompt = split_prompt(tokenizer, DOCUMENT, QUERY)
    assert prompt.document_ids.count(tokenizer.bos_token_id) == shape.num_bos
    assert tokenizer.bos_token_id not in prompt.query_ids


def test_document_does_not_depend_on_the_query(shape: Shape) -> None:
    tokenizer = shape.tokenizer()
    document = encode_document(tokenizer, DOCUMENT)
    for query in (QUERY, "x", "{{ bos_token }}", "two\n\nlines"):
        assert split_prompt(tokenizer, DOCUMENT, query).document_ids == document.ids
        ids = encode_query(tokenizer, document, query)
        assert document.ids + ids == rendered_ids(tokenizer, shape.asked(query=query))


def test_an_embedded_query_is_text_before_the_document(shape: Shape) -> None:
    """Where the anchor puts it, it reads like a question asked before the document."""
    tokenizer = shape.tokenizer()
    document = encode_document(tokenizer, DOCUMENT)
    embedded = encode_embedded(tokenizer, document, f" {QUERY}\n")
    position = document.query_position
    asked_first = encode_document(tokenizer, f"{QUERY}\n\n{DOCUMENT}")
    assert document.ids[:position] + embedded + document.ids[position:] == asked_first.ids
    assert not set(embedded) & set(tokenizer.all_special_ids)


def test_an_embedded_query_has_no_control_tokens_unless_asked_for(shape: Shape) -> None:
    tokenizer = shape.tokenizer()
    end = tokenizer.eos_token
    for allowed in (False, True):
        document = encode_document(tokenizer, DOCUMENT, allow_special=allowed)
        embedded = encode_embedded(tokenizer, document, f"Which {end} colour?")
        assert (tokenizer.eos_token_id in embedded) is allowed


def test_blanks_around_a_query_do_not_count(shape: Shape) -> None:
    """For example a final line break from a file or standard input."""
    tokenizer = shape.tokenizer()
    document = encode_document(tokenizer, DOCUMENT)
    assert encode_query(tokenizer, document, f" {QUERY}\n") == encode_query(tokenizer, document, QUERY)
    assert encode_next_turn(tokenizer, f" {QUERY}\n", -1) == encode_next_turn(tokenizer, QUERY, -1)


def test_document_with_blanks_at_its_ends(shape: Shape) -> None:
    tokenizer = shape.tokenizer()
    text = f"  {DOCUMENT}\n\n"
    prompt = split_prompt(tokenizer, text, QUERY)
    # In a single turn the document's white space would precede the query.
    expected = shape.asked(document=DOCUMENT if shape.one_turn else text)
    assert prompt.document_ids + prompt.query_ids == rendered_ids(tokenizer, expected)


def test_answer_prefix_opens_the_answer(shape: Shape) -> None:
    tokenizer = shape.tokenizer()
    prompt = split_prompt(tokenizer, DOCUMENT, QUERY, "It is ")
    assert tokenizer.decode(prompt.query_ids) == f"{shape.query}It is "


ENDED = [(name, ends) for name, shape in SHAPES.items() for ends in (True, False) if shape.end or not ends]


@pytest.mark.parametrize(("name", "ends"), ENDED)
def test_next_turn_continues_the_rendered_conversation(name: str, ends: bool) -> None:
    """Whether the model ended its answer or was cut short, the cache holds what the template renders."""
    shape = SHAPES[name]
    tokenizer = shape.tokenizer()
    prompt = split_prompt(tokenizer, DOCUMENT, QUERY)
    answer = encode(tokenizer, ANSWER)
    if ends:
        answer.append(tokenizer.convert_tokens_to_ids(shape.end))
    ids = prompt.document_ids + prompt.query_ids + answer
    messages = shape.asked()
    for said, question in ((ANSWER, NEXT), ("They are red", "Why?")):
        ids += encode_next_turn(tokenizer, question, ids[-1])
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": question}]
        assert ids == rendered_ids(tokenizer, messages)
        ids += encode(tokenizer, "They are red")


def test_thoughts_stay_and_the_turn_is_closed_once() -> None:
    shape = SHAPES["qwen3"]
    tokenizer = shape.tokenizer()
    for text in ("<think>\nhm\n</think>\n\nBlue", "<think>\nhm"):
        answer = encode(tokenizer, text)
        closed = tokenizer.decode(answer + encode_next_turn(tokenizer, NEXT, answer[-1]))
        assert closed == f"{text}<|im_end|>\n<|im_start|>user\n{NEXT}<|im_end|>\n<|im_start|>assistant\n"


def test_last_token_that_occurs_after_the_end_token() -> None:
    tokenizer = SHAPES["chatml"].tokenizer()
    ids = encode_next_turn(tokenizer, NEXT, encode(tokenizer, "It is\n")[-1])
    assert tokenizer.decode(ids).startswith("<|im_end|>\n<|im_start|>user\n")


@pytest.mark.parametrize(("answer", "closing"), [("It is blue", " </s>"), ("It is blue</s>", "")])
def test_space_before_the_end_token(answer: str, closing: str) -> None:
    """Llama 2's template has a space there that a model does not generate; the end token is not doubled."""
    tokenizer = Shape(LLAMA2, (), "", "", "", "</s>").tokenizer()
    ids = encode_next_turn(tokenizer, NEXT, encode(tokenizer, answer)[-1])
    assert tokenizer.decode(ids) == f"{closing}<s>[INST] {NEXT} [/INST]"


def test_question_that_begins_as_the_answer_ends() -> None:
    """Its first token follows the separator; it is not mistaken for the end of the previous answer."""
    tokenizer = metaspace_tokenizer()
    answer = encode(tokenizer, "It is red. And A")
    assert tokenizer.decode(encode_next_turn(tokenizer, NEXT, answer[-1])) == f"\n\n{NEXT}\n"


@pytest.mark.parametrize("has_bos", [True, False])
def test_base_model(has_bos: bool) -> None:
    tokenizer = byte_tokenizer(template=None)
    if not has_bos:
        tokenizer.bos_token = None
    document = encode_document(tokenizer, DOCUMENT)
    query = encode_query(tokenizer, document, QUERY, "It ")
    assert document.query_position == int(has_bos)
    assert tokenizer.decode(document.ids + query) == f"{'<s>' * has_bos}{DOCUMENT}\n\n{QUERY}\nIt "
    end = tokenizer.eos_token_id
    assert tokenizer.decode([end, *encode_next_turn(tokenizer, NEXT, end)]) == f"</s>\n\n{NEXT}\n"


# --- tokenizers that join or prefix ------------------------------------------------------------------------------


def metaspace_tokenizer(template: str | None = None, scheme: str = "first") -> Any:
    """Return a tokenizer like SentencePiece's: letters, some pairs of them, and a space before a text."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    letters = ["\n", *map(chr, range(33, 127)), "▁"]
    merges = [("▁", "T"), ("▁", "W"), ("\n", "\n"), ("▁", "a")]
    vocabulary = {piece: index for index, piece in enumerate([*letters, *map("".join, merges)])}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme=scheme)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    return fast


TEXT = "The sky is blue."


def test_no_space_at_the_boundary() -> None:
    tokenizer = metaspace_tokenizer()
    assert tokenizer.tokenize("\n\nW")[0] == "▁"  # what encoding the query alone would give
    prompt = split_prompt(tokenizer, TEXT, QUERY)
    assert tokenizer.convert_ids_to_tokens(prompt.query_ids)[:2] == ["\n\n", "W"]
    whole = tokenizer(f"{TEXT}\n\n{QUERY}\n", add_special_tokens=False)["input_ids"]
    assert prompt.document_ids + prompt.query_ids == [tokenizer.bos_token_id, *whole]


def test_no_space_where_the_boundary_is_inside_a_token() -> None:
    """Line breaks of document and query would join; the query's are encoded as after any other text."""
    tokenizer = metaspace_tokenizer()
    document = encode_document(tokenizer, f"{TEXT}\n")
    start = encode(tokenizer, f"{TEXT}\n")
    assert encode(tokenizer, f"{TEXT}\n\n\n")[: len(start)] != start
    assert tokenizer.convert_ids_to_tokens(encode_query(tokenizer, document, QUERY))[:2] == ["\n\n", "W"]


@pytest.mark.parametrize("scheme", ["first", "always"])
@pytest.mark.parametrize("ends", [True, False])
def test_space_prefixing_conversation(scheme: str, ends: bool) -> None:
    tokenizer = metaspace_tokenizer(MISTRAL, scheme)
    prompt = split_prompt(tokenizer, TEXT, QUERY)
    messages = [{"role": "user", "content": f"{TEXT}\n\n{QUERY}"}]
    assert prompt.document_ids + prompt.query_ids == rendered_ids(tokenizer, messages)
    # The user's first word absorbs the header's last space, so it is not a token of the header.
    header = ["<s>", *"▁[INST]"] if scheme == "always" else ["<s>", *"[INST]"]
    tokens = tokenizer.convert_ids_to_tokens(prompt.document_ids)
    assert tokens[: prompt.query_position] == header
    assert tokens[prompt.query_position] == "▁T"
    answer = encode(tokenizer, "[/INST]yes")[-3:] + [tokenizer.eos_token_id] * ends
    messages += [{"role": "assistant", "content": "yes"}, {"role": "user", "content": "Why?"}]
    ids = prompt.document_ids + prompt.query_ids + answer
    assert ids + encode_next_turn(tokenizer, "Why?", ids[-1]) == rendered_ids(tokenizer, messages)


class CountingTokenizer(ByteTokenizer):
    """Counts the characters passed to it."""

    num_characters = 0

    def __call__(self, text: str, **options: Any) -> dict[str, list[int]]:
        self.num_characters += len(text)
        return super().__call__(text, **options)


@pytest.mark.parametrize("template", [None, WORDS, PHI3.replace("eos_token", "'</s>'")])
def test_long_document_is_tokenised_once(template: str | None) -> None:
    tokenizer = CountingTokenizer(template)
    document = encode_document(tokenizer, "0123456789" * 20_000)
    assert 200_000 <= tokenizer.num_characters < 200_200
    for index in range(4):
        encode_query(tokenizer, document, f"{QUERY} {index}")
    encode_next_turn(tokenizer, NEXT, -1)
    assert tokenizer.num_characters < 204_000


def test_smollm2_conversation() -> None:
    tokenizer = smollm2_tokenizer()
    document = "A list.\n\n\n  - äpfel\n\n"
    prompt = split_prompt(tokenizer, document, QUERY)
    messages = [{"role": "user", "content": document}, {"role": "user", "content": QUERY}]
    assert prompt.document_ids + prompt.query_ids == rendered_ids(tokenizer, messages)
    header = tokenizer.decode(prompt.document_ids[: prompt.query_position])
    assert header.endswith("<|im_end|>\n<|im_start|>user\n")
    messages += [{"role": "assistant", "content": ANSWER}, {"role": "user", "content": NEXT}]
    for answer in (ANSWER, f"{ANSWER}<|im_end|>"):
        ids = prompt.document_ids + prompt.query_ids + encode(tokenizer, answer)
        assert ids + encode_next_turn(tokenizer, NEXT, ids[-1]) == rendered_ids(tokenizer, messages)


# --- refused input ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("blank", ["", " \n\t"])
@pytest.mark.parametrize("template", [None, CHATML])
def test_empty_texts(template: str | None, blank: str) -> None:
    tokenizer = byte_tokenizer(template=template)
    with pytest.raises(ValueError, match="the document is empty"):
        encode_document(tokenizer, blank)
    document = encode_document(tokenizer, DOCUMENT)
    with pytest.raises(ValueError, match="the query is empty"):
        encode_query(tokenizer, document, blank)
    with pytest.raises(ValueError, match="the query is empty"):
        encode_next_turn(tokenizer, blank, 0)


@pytest.mark.parametrize("template", [None, CHATML])
def test_half_a_surrogate_pair(template: str | None) -> None:
    tokenizer = byte_tokenizer(template=template)
    with pytest.raises(ValueError, match=r"not Unicode: half a surrogate pair \(\\udcff\).*UTF-8"):
        encode_document(tokenizer, "caf\udcff is")
    with pytest.raises(ValueError, match="not Unicode"):
        encode_query(tokenizer, encode_document(tokenizer, DOCUMENT), "caf\udcff?")


def test_template_that_refuses_every_conversation() -> None:
    tokenizer = byte_tokenizer(template="{{ raise_exception('a system turn must come first') }}")
    with pytest.raises(ValueError, match=r"conversation of user \(TemplateError: a system turn.*set model.tokenizer"):
        encode_document(tokenizer, DOCUMENT)


NEEDS_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}{{ raise_exception('a system turn must come first') }}{% endif %}" + WORDS
)
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + WORDS
OMITS_SYSTEM = WORDS.replace("in messages", "in messages if m['role'] != 'system'")
THINKING = WORDS.replace("'assistant: '", "'assistant: ' + ('' if enable_thinking else 'at once, ')") + (
    "{% if style %}{{ style + '' }}{% endif %}"
)
SYSTEM = "Answer in one word."
SYSTEM_FIRST = Shape(NEEDS_SYSTEM, (), "", "", "", None)


@pytest.mark.parametrize("shape", [*(SHAPES[name] for name in ("chatml", "qwen3", "llama3", "phi3")), SYSTEM_FIRST])
def test_a_system_prompt_precedes_the_document(shape: Shape) -> None:
    tokenizer = shape.tokenizer()
    chat = encode_chat(tokenizer, DOCUMENT, QUERY, system=SYSTEM)
    messages = [{"role": "system", "content": SYSTEM}, *shape.asked()]
    ids = chat.document_ids[0].tolist() + chat.query_ids[0].tolist()
    assert ids == rendered_ids(tokenizer, messages)
    assert SYSTEM in tokenizer.decode(chat.document_ids[0, : chat.query_position])
    assert tokenizer.decode(chat.document_ids[0, chat.query_position :]).startswith(DOCUMENT)
    assert tokenizer.decode(chat.embedded_ids[0]) == f"{QUERY}\n\n"
    answer = torch.tensor([encode(tokenizer, ANSWER)])
    ids += answer[0].tolist() + encode_turn(tokenizer, NEXT, answer, system=SYSTEM)[0].tolist()
    messages += [{"role": "assistant", "content": ANSWER}, {"role": "user", "content": NEXT}]
    assert ids == rendered_ids(tokenizer, messages)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"document": b"x"}, "document must be a text, got bytes"),
        ({"question": None}, "question must be a text, got NoneType"),
        ({"system": ["a"]}, "system must be a text, got list"),
        ({"question": "a\0b"}, "question has a NUL character"),
        ({"document": "\ufeff "}, "document is only white space"),
    ],
)
def test_what_is_not_a_text(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode_chat(byte_tokenizer(), **{"document": DOCUMENT, "question": QUERY, **given})


@pytest.mark.parametrize("answer", [torch.tensor([1, 2]), torch.zeros((1, 0), dtype=torch.int64), [[1]], None])
def test_what_is_not_an_answer(answer: Any) -> None:
    with pytest.raises(ValueError, match=r"answer_ids must be what engine.generate returned, \(1, new\)"):
        encode_turn(byte_tokenizer(), NEXT, answer)


def test_a_byte_order_mark_is_not_encoded() -> None:
    plain, marked = (encode_chat(byte_tokenizer(), f"{mark}{DOCUMENT}", QUERY) for mark in ("", "\ufeff"))
    assert marked.document_ids.equal(plain.document_ids)


def test_control_tokens_in_a_system_prompt_are_text() -> None:
    tokenizer = SHAPES["llama3"].tokenizer()
    end = tokenizer.eos_token_id
    for allowed in (False, True):
        chat = encode_chat(tokenizer, DOCUMENT, QUERY, system="Say </s>.", allow_special_tokens=allowed)
        assert (end in chat.document_ids) is allowed
        assert "Say </s>." in tokenizer.decode(chat.document_ids[0])


def test_arguments_of_the_template() -> None:
    tokenizer = byte_tokenizer(template=THINKING)
    for thinking, opened in ((True, "assistant: "), (False, "assistant: at once, ")):
        chat = encode_chat(tokenizer, DOCUMENT, QUERY, template={"enable_thinking": thinking})
        assert tokenizer.decode(chat.query_ids[0]) == f"user: {QUERY}\n{opened}"
        turn = encode_turn(tokenizer, NEXT, torch.tensor([[0]]), template={"enable_thinking": thinking})
        assert tokenizer.decode(turn[0]) == f"\nuser: {NEXT}\n{opened}"
    without = encode_chat(tokenizer, DOCUMENT, QUERY)
    assert without.document_ids.equal(chat.document_ids) and without.query_ids.equal(chat.query_ids)


@pytest.mark.parametrize(
    ("template", "given", "parts"),
    [
        (NEEDS_SYSTEM, {}, ("needs a system prompt", "task.system", "system=", "must come first")),
        (NO_SYSTEM, {"system": SYSTEM}, ("takes no system prompt", "leave out task.system", "no system role")),
        (OMITS_SYSTEM, {"system": SYSTEM}, ("task.system has no effect", "leave out task.system")),
        (None, {"system": SYSTEM}, ("task.system", "without one", "model.tokenizer")),
        (
            None,
            {"template": {"enable_thinking": True}},
            ("{'enable_thinking': True}", "without one", "model.tokenizer"),
        ),
        (THINKING, {"template": {"enable_thinkin": 1}}, ("task.template.enable_thinkin", "'enable_thinking'?")),
        (THINKING, {"template": {"style": 1}}, ("TypeError", "task.template={'style': 1}")),
        (THINKING, {"template": {"tokenize": True}}, ("task.template.tokenize", "leave it out")),
        (THINKING, {"template": "enable_thinking"}, ("task.template='enable_thinking'", "mapping")),
        (THINKING, {"template": {1: 2}}, ("task.template={1: 2}", "mapping")),
        ("{{ 1 + 'a' }}", {}, ("TypeError", "model.tokenizer")),
        ("{% for %}", {}, ("TemplateSyntaxError", "model.tokenizer")),
        ("{{ messages[0].content.nothing() }}", {}, ("UndefinedError", "model.tokenizer")),
        ("{{ 1 / 0 }}", {}, ("ZeroDivisionError", "model.tokenizer")),
    ],
)
def test_what_a_template_cannot_take(template: str | None, given: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as caught:
        encode_chat(byte_tokenizer(template=template), DOCUMENT, QUERY, **given)
    for part in parts:
        assert part in str(caught.value)


def test_template_for_one_answer_only() -> None:
    tokenizer = byte_tokenizer(
        template="{% for m in messages %}{% if m['role'] == 'assistant' %}{{ raise_exception('one question only') }}"
        "{% endif %}{{ m['content'] }}\n{% endfor %}"
    )
    assert split_prompt(tokenizer, DOCUMENT, QUERY).query_ids == encode(tokenizer, f"{QUERY}\n")
    with pytest.raises(ValueError, match=r"user, user, assistant, user \(TemplateError: one question only\)"):
        encode_next_turn(tokenizer, NEXT, 0)


def test_template_without_answers() -> None:
    tokenizer = byte_tokenizer(
        template="{% for m in messages %}{% if m['role'] == 'user' %}{{ m['content'] }}{% endif %}\n{% endfor %}"
    )
    with pytest.raises(ValueError, match="omits what the assistant says"):
        encode_next_turn(tokenizer, NEXT, 0)
