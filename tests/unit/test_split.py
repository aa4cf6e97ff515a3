"""Where prompts are cut: the engine's ids by the rule of the server's texts."""

from __future__ import annotations

from typing import Any

import pytest

import apb_ds
from apb_ds.engine.split import LAST_CHARACTERS, LAST_IDS
from apb_ds.serving.prompts import Prompts
from tests.tiny_checkpoint import byte_tokenizer

TOKENIZER = byte_tokenizer()
MIN = 40
LONG = "The grass is green. " * 5


def split(**given: Any) -> apb_ds.Split:
    return apb_ds.Split.of({"min_document": MIN, **given})


def ids_of(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False)["input_ids"])


def question_of(prompt: str, **given: Any) -> str:
    """The part of a prompt that is not its document, with the tokenizer."""
    ids = ids_of(prompt)
    return str(TOKENIZER.decode(ids[split(tokenizer=TOKENIZER, **given).document_length(ids) :]))


@pytest.mark.parametrize(
    "text, question",
    [
        (f"{LONG}\n\n{LONG}\n\nWhat is green?", "\n\nWhat is green?"),
        (f"{LONG}\n\nWhat\nis green?\n\n", "\n\nWhat\nis green?\n\n"),
        (f"{LONG}\nWhat is green?", "\nWhat is green?"),
        (f"{LONG}\n\n{LONG}\nWhat is green?", "\nWhat is green?"),  # what follows the empty line is too long
        ("Short.\n\nWhat?", "Short.\n\nWhat?"),
        (f"Short.\n\n{LONG}", f"Short.\n\n{LONG}"),
    ],
)
def test_the_engine_cuts_where_the_server_does(text: str, question: str) -> None:
    assert question_of(text) == question
    served = Prompts(TOKENIZER, MIN, "\n\n", 10**6, None, 1000).text(text)
    assert TOKENIZER.decode(served.rest.tolist()) == question


def test_a_text_without_lines_is_cut_near_its_end() -> None:
    text = (LONG * 100).rstrip()
    question = question_of(text, min_document=2 * LAST_CHARACTERS)
    assert LAST_CHARACTERS / 2 < len(question) <= LAST_CHARACTERS and question.startswith(" ")


def test_another_text_to_cut_before() -> None:
    assert question_of(f"{LONG}\n\nQ: What\n\nis green?", text="\n\nQ:") == "\n\nQ: What\n\nis green?"


def test_a_chat_is_cut_before_what_its_template_adds() -> None:
    """Not at the template's own last line, behind the question."""
    chat = f"<|user|>{LONG}\nWhat is green?</s>\n<|assistant|>\n"
    assert question_of(chat) == "\nWhat is green?</s>\n<|assistant|>\n"


class Pairs:
    """A tokenizer of two characters a token."""

    all_special_ids = ()

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(chr(token // 256) + chr(token % 256) for token in ids)


def test_a_token_that_holds_the_cut_belongs_to_the_question() -> None:
    text = "abcdefgh" * 5 + ".\n\nWhat is it?"
    ids = [256 * ord(text[index]) + ord(text[index + 1]) for index in range(0, len(text), 2)]
    length = split(tokenizer=Pairs(), min_document=10).document_length(ids)
    assert Pairs().decode(ids[length:]) == ".\n\nWhat is it?"


@pytest.mark.parametrize("last_ids", [None, 7])
def test_without_a_tokenizer_the_last_ids_are_the_query(last_ids: int | None) -> None:
    last = last_ids or LAST_IDS
    for num_ids, expected in ((MIN + last, MIN), (MIN + last - 1, 0), (3000, 3000 - last)):
        assert split(last_ids=last_ids).document_length([5] * num_ids) == expected
    if last_ids is None:
        assert len(Prompts(TOKENIZER, MIN, "\n\n", 10**6, None, 1000).text([5] * 3000).document) == 3000 - last


def test_defaults_are_the_servers() -> None:
    from apb_ds.serving.config import ServeConfig

    assert (apb_ds.Split().min_document, apb_ds.Split.of(None)) == (ServeConfig().min_document, apb_ds.Split())
    assert question_of(f"{LONG}{ServeConfig().split}What?") == f"{ServeConfig().split}What?"


@pytest.mark.parametrize(
    "given, named",
    [
        ("\n\n", "must be an apb_ds.Split"),
        ({"min_tokens": 3}, "min_tokens is unknown; it has tokenizer, text"),
        ({"min_document": 0}, "min_document=0"),
        ({"last_ids": 0}, "last_ids=0"),
        ({"text": "\n"}, "text needs tokenizer"),
        ({"text": "", "tokenizer": TOKENIZER}, "text=''"),
        ({"last_ids": 3, "tokenizer": TOKENIZER}, "exclude each other"),
        ({"tokenizer": "gpt2"}, "tokenizer=str"),
    ],
)
def test_other_settings_are_refused(given: Any, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        apb_ds.Split.of(given)


def test_an_engine_takes_a_mapping_or_refuses_it() -> None:
    from tests.models import build_model

    engine = apb_ds.init_inference(build_model("llama"), {"hosts": 4})
    engine.split = {"last_ids": 5, "min_document": MIN}
    assert engine.split == apb_ds.Split(last_ids=5, min_document=MIN)
    with pytest.raises(ValueError, match="last_id"):
        engine.split = {"last_id": 5}
    assert engine.split.last_ids == 5
