"""How far a method's predictions are from exact ones, over long texts. Needs no answers, so any model will do."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from apb_ds.tasks.base import Sample, TaskConfig, needs_tokenizer, random_sample, register_task
from apb_ds.tasks.checks import as_tuple, check_integers
from apb_ds.tasks.prompts import encode_text
from apb_ds.tasks.text import FILE_MARK, expand_path, read_text

# Code, tables and prose that come with every Python.
STANDARD_TEXTS = (
    "typing.py",
    "tarfile.py",
    "argparse.py",
    "_pydecimal.py",
    "pydoc_data/topics.py",
    "html/entities.py",
    "unittest/mock.py",
    "email/_header_value_parser.py",
)


@register_task
@dataclass(frozen=True)
class FidelityConfig(TaskConfig):
    """Texts whose first tokens are the document, and whose next ones are judged.

    The anchor never contains judged tokens: the document is prefilled without them.

    Parameters
    ----------
    texts : list of str
        Text files, or folders of them. Default: eight files of Python's standard library.
    num_tokens : int, tokens
        The document's length.
    judged_tokens : int, tokens
        How many tokens after it are judged.
    """

    name: ClassVar[str] = "fidelity"
    texts: str | list[str] | None = None
    num_tokens: int = 7424
    judged_tokens: int = 256

    def __post_init__(self) -> None:
        check_integers(self, num_tokens=1, judged_tokens=1)
        texts = as_tuple(self.texts)
        if self.texts is not None and (not texts or not all(isinstance(text, str) and text for text in texts)):
            raise ValueError(f"task.texts={self.texts!r} must be text files or folders of them.")

    def check_sources(self) -> None:
        self.files()

    def files(self) -> list[Path]:
        """Return the files, those of a folder by name; ValueError if one does not exist, or a folder is empty."""
        if self.texts is None:
            library = Path(sysconfig.get_paths()["stdlib"])
            return [library / name for name in STANDARD_TEXTS]
        files = []
        for text in as_tuple(self.texts):
            path = expand_path("task.texts", text)
            inside = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
            if not inside or not inside[0].is_file():
                raise ValueError(f"task.texts={text!r}: there is no text file at {path.absolute()}.")
            files += inside
        return files

    def samples(self, tokenizer: Any | None, vocab_size: int, seed: int) -> Iterator[Sample]:
        """Yield one sample per text, whose query is the judged tokens; ValueError if a text is too short."""
        needed = self.num_tokens + self.judged_tokens
        if tokenizer is None and self.texts is None:
            yield random_sample(self.num_tokens, self.judged_tokens, vocab_size, seed, 1)
            return
        tokenizer = needs_tokenizer(tokenizer, self.name)
        for file in self.files():
            ids = encode_text(tokenizer, read_text("task.texts", f"{FILE_MARK}{file}"))
            if len(ids) < needed:
                raise ValueError(
                    f"task.texts: {file} has {len(ids)} tokens; task.num_tokens={self.num_tokens} and "
                    f"task.judged_tokens={self.judged_tokens} need {needed}. Leave it out, or ask for fewer."
                )
            document, judged = torch.tensor([ids[:needed]]).split([self.num_tokens, self.judged_tokens], dim=1)
            yield Sample(document, judged, min(1, self.num_tokens), max_new_tokens=1, labels={"text": file.name})

    def score(self, sample: Sample, prediction: str) -> float | None:
        """Return None: predictions are compared, not scored."""
        return None
