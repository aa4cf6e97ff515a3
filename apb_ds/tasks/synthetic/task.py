"""The task: synthetic documents as samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from apb_ds.config import check_integer
from apb_ds.tasks.base import Sample, TaskConfig, random_sample, register_task
from apb_ds.tasks.prompts import EncodedDocument, encode_document, encode_embedded, encode_query
from apb_ds.tasks.synthetic.generate import generate
from apb_ds.tasks.synthetic.recipe import Recipe
from apb_ds.tasks.synthetic.scoring import score

RANDOM_QUERY_TOKENS = 32


@register_task
@dataclass(frozen=True)
class SyntheticConfig(Recipe, TaskConfig):
    """Documents whose questions have answers that can be checked, but not guessed.

    Parameters
    ----------
    num_tokens : int, tokens
        A document's length at most, chat template included; as much is taken as fits.
    num_samples : int
        Number of documents.
    max_new_tokens : int, tokens
        Length of an answer at most. Default: what the answers need, and 16.
    kind, split, num_questions and so on : see `Recipe`

    Raises
    ------
    ValueError
        For a value out of its range, naming the field and what is allowed.
    """

    name: ClassVar[str] = "synthetic"
    num_tokens: int = 4096
    num_samples: int = 1
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("task.num_tokens", self.num_tokens, 1)
        check_integer("task.num_samples", self.num_samples, 1)
        if self.max_new_tokens is not None:
            check_integer("task.max_new_tokens", self.max_new_tokens, 1)

    def samples(self, tokenizer: Any | None, vocab_size: int, seed: int) -> Iterator[Sample]:
        """Yield a sample for every question; those about one document come in a row and share its ids."""
        max_new_tokens = self.max_new_tokens or self.answer_tokens
        for index in range(self.num_samples):
            if tokenizer is None:
                yield from self._random_samples(vocab_size, seed + index * self.num_questions, max_new_tokens)
                continue
            encoder = _Encoder(tokenizer)
            document = generate(self, f"{seed}.{index}", self.num_tokens, encoder.length)
            encoded = encoder.encode(document.text)
            document_ids = torch.tensor([encoded.ids])
            for question in document.questions:
                query_ids = encode_query(tokenizer, encoded, question.query, question.answer_prefix)
                yield Sample(
                    document_ids=document_ids,
                    query_ids=torch.tensor([query_ids]),
                    embedded_ids=torch.tensor([encode_embedded(tokenizer, encoded, question.query)]),
                    query_position=encoded.query_position,
                    max_new_tokens=max_new_tokens,
                    ground_truth=", ".join(question.answers),
                    answers=question.answers,
                    labels=self._labels,
                )

    def score(self, sample: Sample, prediction: str) -> float | None:
        """Return the share of the wanted texts that the prediction holds."""
        return score(prediction, sample.answers) if sample.answers else None

    @property
    def _labels(self) -> dict[str, Any]:
        return {"kind": self.kind, "length": self.num_tokens}

    def _random_samples(self, vocab_size: int, seed: int, max_new_tokens: int) -> Iterator[Sample]:
        for index in range(self.num_questions):
            sample = random_sample(self.num_tokens, RANDOM_QUERY_TOKENS, vocab_size, seed + index, max_new_tokens)
            yield replace(sample, labels=self._labels)


class _Encoder:
    """Encodes documents and keeps the last few, so that the one that is chosen need not be encoded again."""

    KEPT = 4

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._kept: dict[str, EncodedDocument] = {}

    def encode(self, text: str) -> EncodedDocument:
        if text not in self._kept:
            if len(self._kept) == self.KEPT:
                self._kept.pop(next(iter(self._kept)))
            self._kept[text] = encode_document(self._tokenizer, text)
        return self._kept[text]

    def length(self, text: str) -> int:
        return len(self.encode(text).ids)
