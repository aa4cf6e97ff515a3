"""Many questions from a file, answered into another."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from apb_ds.config import check_bool, check_integer
from apb_ds.tasks.answering import AnsweringConfig
from apb_ds.tasks.base import register_task
from apb_ds.tasks.checks import check_optional_text
from apb_ds.tasks.jsonl import file_problem
from apb_ds.tasks.text import expand_path

ANSWERS_SUFFIX = ".answers.jsonl"


@register_task
@dataclass(frozen=True)
class BatchConfig(AnsweringConfig):
    """Questions in a JSONL file.

    Parameters
    ----------
    input : str
        The file: one object a line with ``id``, ``document`` or ``document_file`` (relative to the file), ``query``
        and optionally ``max_new_tokens``.
    output : str, optional
        Where the answers go. Default: ``<input>.answers.jsonl`` next to the input; in a sweep, ``answers.jsonl`` in
        the job's directory. Lines answered there before are not answered again.
    reuse_prefill : bool
        Whether consecutive lines with the same document share one prefill, whose anchor then embeds no query. False:
        every line gets a prefill, with its query in the anchor.
    overwrite : bool
        Answer all lines again if the output exists; the old file is kept as ``<output>.bak``.
    sequences : int
        Lines whose answers are decoded together, of one document or of several. The documents of several are in memory
        at the same time, as far as there is room.
    max_new_tokens and so on : for each answer, see `AnsweringConfig`; a line's ``max_new_tokens`` takes precedence
    """

    name: ClassVar[str] = "batch"
    input: str = ""
    output: str | None = None
    reuse_prefill: bool = True
    overwrite: bool = False
    sequences: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.input, str) or not self.input:
            raise ValueError(
                f"task.input={self.input!r} is missing: give a JSONL file with id, document or document_file, and "
                "query on each line."
            )
        check_optional_text("task.output", self.output, "the name of a file")
        check_bool("task.reuse_prefill", self.reuse_prefill)
        check_bool("task.overwrite", self.overwrite)
        check_integer("task.sequences", self.sequences, 1)
        if self.output is not None and self.output_path(None).resolve() == self.input_path.resolve():
            raise ValueError(f"task.output={self.output!r} is the input; give another file.")

    @property
    def input_path(self) -> Path:
        return expand_path("task.input", self.input)

    def output_path(self, run_dir: Path | None) -> Path:
        """Return where the answers go: to `output`, else into `run_dir`, else next to the input."""
        if self.output is not None:
            return expand_path("task.output", self.output)
        if run_dir is not None:
            return run_dir / "answers.jsonl"
        return self.input_path.with_name(self.input_path.name.removesuffix(".jsonl") + ANSWERS_SUFFIX)

    def check_sources(self) -> None:
        super().check_sources()
        problem = file_problem(self.input_path)
        if problem:
            raise ValueError(f"task.input={self.input!r}: {self.input_path.absolute()} {problem}; name a JSONL file.")
