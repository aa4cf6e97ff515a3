"""InfiniteBench's prompts as document and query.

The benchmark has templates for each model it was first run on (``src/prompt.py`` in its repository). We use
the ones for the only open model among them, YaRN-Mistral, as does later work with open models, APB's own included; the
answers' lengths are made for them. Their wording is unchanged, since scores depend on it
(``assets/infinitebench/templates.yaml``). A template consists of instruction, context, question, and a cue that the
answer follows ("The pass key is").

Instruction and context are the document; question and cue are the query. A model without a chat template gets the
benchmark's exact text. One with a template gets document and question as turns, and the cue at the beginning of its own
turn; for tasks whose template has no question (longdialogue_qa_eng, longbook_sum_eng, math_calc) we ask one, which is
not the benchmark's wording.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

import torch

from apb_ds.tasks.base import Sample, text_sample
from apb_ds.tasks.infinitebench.names import LETTERS
from apb_ds.tasks.infinitebench.rows import FUNCTION_CALL, WANTED_NUMBER, Row
from apb_ds.tasks.prompts import encode_document
from apb_ds.tasks.texts import read_texts

# Questions that end with the cue itself.
CUES = {"kv_retrieval": re.compile(r"The value .+ is:\s*$"), "math_find": re.compile(r"The .+ of.*$", re.DOTALL)}
# Document tokens that remain on either side of a cut, however long the query: they include the template's.
SMALLEST_PART = 16


@dataclass(frozen=True)
class Template:
    """The text around a context.

    Attributes
    ----------
    lead : before the context: the instruction
    between, question, gap, cue : after it, in this order
    chat_question : what a chat asks if there is no question
    """

    lead: str
    between: str = "\n\n"
    question: str = ""
    gap: str = ""
    cue: str = ""
    chat_question: str = ""


@dataclass(frozen=True)
class Prompt:
    """A prompt as text.

    Attributes
    ----------
    document : instruction and context
    query : what follows it for a model without a chat template
    question, cue : what a chat asks, and how its answer begins
    """

    document: str
    query: str
    question: str
    cue: str


def make_prompt(task: str, row: Row) -> Prompt:
    """Return the prompt of a row as text."""
    template = Template(**read_texts("infinitebench/templates")[task])
    options = "\n".join(f"{letter}. {option}" for letter, option in zip(LETTERS, row.options, strict=False))
    values = {"question": row.question, "options": options, **_found(task, row.question)}
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
    """Return the sample of a row; its label ``truncated`` says whether the document was cut.

    Parameters
    ----------
    max_new_tokens : int, tokens
    max_tokens : int, tokens, optional
        What document, query and answer must fit into: a longer document loses its middle. None: nothing is cut.

    Raises
    ------
    ValueError
        If query and answer leave no room for a document.
    """
    prompt = make_prompt(task, row)
    document = encode_document(tokenizer, prompt.document)
    num_tokens = len(document.ids)
    sample = text_sample(
        tokenizer,
        document,
        prompt.question,
        prompt.cue,
        untemplated=prompt.query,
        max_new_tokens=max_new_tokens,
        ground_truth=row.answers[0],
        answers=row.answers,
        labels={"task": task, "truncated": False},
        notes={"row_id": row.id, "whole_document_tokens": num_tokens},
    )
    if max_tokens is None or sample.num_positions <= max_tokens:
        return sample
    ids = torch.tensor([_cut(task, document.ids, sample.num_query, max_new_tokens, max_tokens)])
    return replace(sample, document_ids=ids, labels={"task": task, "truncated": ids.shape[1] < num_tokens})


def _found(task: str, question: str) -> dict[str, str]:
    """Return the parts of the question that a template repeats."""
    if task == "code_run":
        call = FUNCTION_CALL.findall(question)[0]
        return {"call": call, "function": call.split("(")[0]}
    if task == "math_find":
        return {"wanted": WANTED_NUMBER.findall(question)[0].lower().removesuffix(" of")}
    return {}


def _cut(task: str, ids: list[int], num_query: int, max_new_tokens: int, max_tokens: int) -> list[int]:
    """Return a document without its middle, so that as much of the prompt remains before the cut as after it.

    That is where the benchmark cuts prompts; what follows the cut includes the query.
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
