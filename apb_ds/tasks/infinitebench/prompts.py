"""InfiniteBench's prompts as document and query.

The benchmark has a set of templates for each kind of model it was first run on (``src/prompt.py`` of its repository).
These are those of the one open model among them, YaRN-Mistral, which later work with open models took over, APB's own
included: the answers' lengths are made for them. Their wording is kept, since scores depend on it. A template is the
instruction, the context, the question, and a cue that the answer follows ("The pass key is").

Instruction and context are the document; question and cue are the query. A model without a chat template gets the
benchmark's text to the letter. One with a template gets document and question as turns, with the cue at the beginning
of its own; a task whose template has no question of its own (longdialogue_qa_eng, longbook_sum_eng, math_calc) asks
one, in words that are not the benchmark's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from apb_ds.tasks.base import Sample
from apb_ds.tasks.control import mask
from apb_ds.tasks.infinitebench.names import LETTERS
from apb_ds.tasks.infinitebench.rows import FUNCTION_CALL, WANTED_NUMBER, Row
from apb_ds.tasks.prompts import encode_after, encode_document, encode_embedded, encode_query, has_template

OPTIONS = "\n".join(f"{letter}. {{{letter}}}" for letter in LETTERS)
# Where a question ends in the cue itself.
CUES = {"kv_retrieval": re.compile(r"The value .+ is:\s*$"), "math_find": re.compile(r"The .+ of.*$", re.DOTALL)}
# Document tokens that stay on either side of a cut, whatever the query's length: the template's own are among them.
SMALLEST_PART = 16


@dataclass(frozen=True)
class Template:
    """What is around a context.

    Attributes
    ----------
    lead : before the context
    question, gap, cue : after it and a blank line (`between`)
    chat_question : what a chat asks where there is no question
    """

    lead: str
    question: str = ""
    gap: str = ""
    cue: str = ""
    between: str = "\n\n"
    chat_question: str = ""


@dataclass(frozen=True)
class Prompt:
    """A prompt as text.

    Attributes
    ----------
    document : instruction and context
    query : what follows it for a model without a chat template
    question, cue : what a chat asks, and what opens its answer
    """

    document: str
    query: str
    question: str
    cue: str


TEMPLATES = {
    "passkey": Template(
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you "
        "about the important information.\n\n",
        "{question}",
        "\n\n",
        "The pass key is",
    ),
    "number_string": Template(
        "There is an important info hidden inside a lot of irrelevant text. Find it. I will quiz you about the "
        "important information there.\n\n",
        "{question}",
        "\n\n",
        "The sequence of digits is",
    ),
    "kv_retrieval": Template(
        "Extract the value corresponding to the specified key in the JSON object below.\n\n", "{question}"
    ),
    "longdialogue_qa_eng": Template(
        'Below is a dialogue script where one random occurrence of a character name is replaced with "$$MASK$$", and '
        "you should try to guess who that character is.\n\n",
        cue="The name that has been replaced with $$MASK$$ is likely",
        chat_question="Which character's name was replaced with $$MASK$$?",
    ),
    "longbook_qa_eng": Template(
        "Read the book and answer the question. Be very concise in your answer.\n\n",
        "Question: {question}",
        "\n",
        "Answer:",
    ),
    "longbook_qa_chn": Template("阅读以下书籍然后回答问题。\n\n", "问题：{question}", "\n", "答案："),  # noqa: RUF001
    "longbook_choice_eng": Template(
        "Read the book and answer the question.\n\n",
        "Question: {question}\n" + OPTIONS,
        "\n\n",
        "The letter of the correct answer is",
    ),
    "longbook_sum_eng": Template(
        "Summarize the book below.\n\n", cue="Summary:", chat_question="Write the summary of the book above."
    ),
    "code_run": Template(
        "There is a function called {function} in the following Python code.\n\n",
        "Please compute the exact value of {call}.",
        " ",
        "The value of {call} is",
    ),
    "code_debug": Template(
        "Following is a Python code where exactly one of the functions/methods has a deliberate error that makes it "
        "crash.\n\n",
        "Options:\n" + OPTIONS,
        "\n\n",
        "The correct option is:",
    ),
    "math_find": Template(
        "What is {wanted} in the following list?\n\n", "{question}", chat_question="What is {wanted} in the list above?"
    ),
    "math_calc": Template(
        "Let us calculate the intermediate values of an expression.\n\nExpression: 1 + 3 + 4\nValues: [1, 4, 8]\n\n"
        "Expression: 8 - 3 + 2 - 4\nValues: [8, 5, 7, 3]\n\nExpression: ",
        cue="Values:",
        between="\n",
        chat_question="What are the intermediate values of the last expression? Give them as in the examples.",
    ),
}


def make_prompt(task: str, row: Row) -> Prompt:
    """Return the prompt of a row as text."""
    template = TEMPLATES[task]
    values = {"question": row.question, **dict(zip(LETTERS, row.options, strict=False)), **_found(task, row.question)}
    question, cue = template.question.format(**values), template.cue.format(**values)
    query = template.between + question + template.gap + cue
    if task in CUES:
        found = CUES[task].search(question)
        start = len(question) if found is None else found.start()
        question, cue = question[:start], question[start:]
    return Prompt(
        document=template.lead.format(**values) + row.context,
        query=query,
        question=question.strip() or template.chat_question.format(**values),
        cue=cue.strip(),
    )


def make_sample(tokenizer: Any, task: str, row: Row, max_new_tokens: int, max_tokens: int | None) -> Sample:
    """Return the sample of a row; labels say whether it was truncated.

    Parameters
    ----------
    max_new_tokens : int, tokens
    max_tokens : int, tokens, optional
        What document, query and answer have to fit into: a longer document loses its middle. None: nothing is cut.

    Raises
    ------
    ValueError
        If next to query and answer there is no room for a document.
    """
    prompt = make_prompt(task, row)
    encoded = encode_document(tokenizer, prompt.document)
    if has_template(tokenizer):
        query_ids = encode_query(tokenizer, encoded, prompt.question, prompt.cue)
    else:
        query_ids = encode_after(tokenizer, encoded.end, mask(tokenizer, prompt.query))
    num_tokens = len(encoded.ids) + len(query_ids) + max_new_tokens
    document_ids = encoded.ids
    if max_tokens is not None and num_tokens > max_tokens:
        document_ids = _cut(task, encoded.ids, len(query_ids), max_new_tokens, max_tokens)
    return Sample(
        document_ids=torch.tensor([document_ids]),
        query_ids=torch.tensor([query_ids]),
        embedded_ids=torch.tensor([encode_embedded(tokenizer, encoded, prompt.question)]),
        query_position=encoded.query_position,
        max_new_tokens=max_new_tokens,
        ground_truth=row.answers[0],
        answers=row.answers,
        labels={"task": task, "truncated": len(document_ids) < len(encoded.ids)},
        notes={"row_id": row.id, "whole_document_tokens": len(encoded.ids)},
    )


def _found(task: str, question: str) -> dict[str, str]:
    """Return what a template says that stands somewhere in the question."""
    if task == "code_run":
        call = FUNCTION_CALL.findall(question)[0]
        return {"call": call, "function": call.split("(")[0]}
    if task == "math_find":
        return {"wanted": WANTED_NUMBER.findall(question)[0].lower().removesuffix(" of")}
    return {}


def _cut(task: str, ids: list[int], num_query: int, max_new_tokens: int, max_tokens: int) -> list[int]:
    """Return a document without its middle, so that as much of the prompt stays before the cut as behind it.

    The benchmark cuts prompts there; what is behind the cut includes the query.
    """
    half = (max_tokens - max_new_tokens) // 2
    if half < num_query + SMALLEST_PART:
        raise ValueError(
            f"task.max_tokens={max_tokens} leaves too little for a document of {task}: its query has {num_query} "
            f"tokens and its answer up to {max_new_tokens}, and half of the rest must hold the query and "
            f"{SMALLEST_PART} tokens. Raise task.max_tokens (default: the model's positions), lower "
            f"task.max_new_tokens, or leave {task} out of task.tasks."
        )
    return ids[:half] + ids[-(half - num_query) :]
