"""The task: synthetic documents as samples."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from apb_ds.tasks.base import ConversationConfig, Sample, random_sample, register_task, text_sample
from apb_ds.tasks.checks import check_integers
from apb_ds.tasks.prompts import EncodedDocument, encode_document
from apb_ds.tasks.synthetic.generate import generate
from apb_ds.tasks.synthetic.recipe import Recipe
from apb_ds.tasks.synthetic.scoring import score

RANDOM_QUERY_TOKENS = 32


@register_task
@dataclass(frozen=True)
class SyntheticConfig(Recipe, ConversationConfig):
    """Documents whose questions have answers that can be checked, but not guessed.

    Parameters
    ----------
    num_tokens : int, tokens
        A document's length at most, chat template included; it takes as much as fits.
    num_samples : int
        Number of documents.
    max_new_tokens : int, tokens
        Length of an answer at most. Default: what the answers need, and 16.
    kind, split, num_questions and so on : see `Recipe`
    system, template : see `ConversationConfig`
    """

    name: ClassVar[str] = "synthetic"
    num_tokens: int = 4096
    num_samples: int = 1
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        Recipe.__post_init__(self)
        ConversationConfig.__post_init__(self)
        check_integers(self, num_tokens=1, num_samples=1, max_new_tokens=1)

    def samples(self, tokenizer: Any | None, vocab_size: int, seed: int) -> Iterator[Sample]:
        """Yield a sample for every question; those about one document are consecutive and share its ids."""
        max_new_tokens = self.max_new_tokens or self.answer_tokens
        labels = {"kind": self.kind, "length": self.num_tokens}
        if tokenizer is None:
            for index in range(self.num_samples * self.num_questions):
                sample = random_sample(self.num_tokens, RANDOM_QUERY_TOKENS, vocab_size, seed + index, max_new_tokens)
                yield replace(sample, labels=labels)
            return
        for index in range(self.num_samples):
            encoder = DocumentEncoder(tokenizer)
            document = generate(self, f"{seed}.{index}", self.num_tokens, encoder.length)
            for question in document.questions:
                yield text_sample(
                    tokenizer,
                    encoder.encode(document.text),
                    question.query,
                    question.answer_prefix,
                    max_new_tokens=max_new_tokens,
                    ground_truth=", ".join(question.answers),
                    answers=question.answers,
                    labels=labels,
                )

    def score(self, sample: Sample, prediction: str) -> float | None:
        """Return the share of the answers that the prediction contains."""
        return score(prediction, sample.answers) if sample.answers else None


class DocumentEncoder:
    """Encodes documents and keeps the last few, so that the chosen one is not encoded again."""

    KEPT = 4

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._kept: dict[str, EncodedDocument] = {}

    def encode(self, text: str) -> EncodedDocument:
        """Return a document's ids."""
        if text not in self._kept:
            if len(self._kept) == self.KEPT:
                self._kept.pop(next(iter(self._kept)))
            self._kept[text] = encode_document(self._tokenizer, text)
        return self._kept[text]

    def length(self, text: str) -> int:
        """Return a document's tokens."""
        return len(self.encode(text).ids)
