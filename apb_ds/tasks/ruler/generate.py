"""Samples from lm-evaluation-harness's generators: as many as asked for, from the user's files, without a download.

The generators take their number of samples, tokenizer and sources from names in their modules. Those names are replaced
while a generator runs, and restored afterwards: the harness's code alone makes the prompts.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

from apb_ds.tasks.ruler.harness import HarnessTask, load_module, quiet
from apb_ds.tasks.ruler.names import ESSAY_TASKS, QUESTION_FILES
from apb_ds.tasks.ruler.prompts import PromptCounter
from apb_ds.tasks.ruler.sources import read_questions, read_words

# The function of each module that makes the samples, 500 by default.
GENERATORS = {
    "niah_utils": "generate_samples",
    "cwe_utils": "sys_word_pair_random",
    "fwe_utils": "sys_kwext",
    "vt_utils": "sys_vartrack_w_noise_random",
    "qa_utils": "generate_samples",
}
# With fewer words or lines of noise, these modules would make nothing sensible, or never end.
SMALLEST = {"cwe_utils": 20, "vt_utils": 5}
# The harness adds essays in steps of this many words; if one step does not fit, it hides its needles in a handful.
ESSAY_WORDS = 500

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PromptSpec:
    """Which prompts to make: how many, how long (tokens, answer included), from which files."""

    length: int
    num_samples: int
    max_new_tokens: int
    seed: int
    files: tuple[Path, ...] = ()


def generate(task: HarnessTask, tokenizer: Any, spec: PromptSpec) -> list[dict[str, Any]]:
    """Return the harness's samples: ``input``, ``gen_prefix`` and ``outputs`` of each.

    Questions whose documents do not fit are left out, so there may be fewer than asked for; a warning says so.

    Raises
    ------
    ValueError
        If no sample fits.
    """
    module = load_module(task.module)
    counter = PromptCounter(tokenizer, task.name, spec.max_new_tokens, spec.length)
    too_short = ValueError(
        f"task.length={spec.length} is too short for {task.name} with this tokenizer: its shortest prompt and an "
        f"answer of {spec.max_new_tokens} tokens do not fit; raise task.length."
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(module, **_replacements(task, module, counter, spec)))
        stack.enter_context(_sentences(task))
        stack.enter_context(_seeded(module, f"{spec.seed}/{task.name}/{spec.length}"))
        stack.enter_context(quiet())
        try:
            made = getattr(module, task.function)(max_seq_lengths=[spec.length])["test"]
        except ValueError as error:
            raise too_short from error
    scanty = task.name in ESSAY_TASKS and any(len(row["input"].split()) < ESSAY_WORDS for row in made)
    if counter.gave_up or scanty:
        raise too_short
    if len(made) < spec.num_samples:
        template = "%s: only %d of %d samples fit into task.length=%d."
        logger.warning(template, task.name, len(made), spec.num_samples, spec.length)
    return [{name: row[name] for name in ("input", "gen_prefix", "outputs")} for row in made]


def _replacements(task: HarnessTask, module: ModuleType, counter: PromptCounter, spec: PromptSpec) -> dict[str, Any]:
    """Return what replaces names of the module while it makes samples."""
    generator = getattr(module, GENERATORS[task.module])
    asked = {"num_samples": spec.num_samples, "tokens_to_generate": spec.max_new_tokens}
    bounded = functools.partial(_call_with, generator, asked)
    names: dict[str, Any] = {"get_tokenizer": lambda *_, **__: counter, GENERATORS[task.module]: bounded}
    if task.name == "ruler_vt":
        names[GENERATORS[task.module]] = _with_example(bounded, generator, counter)
    if task.module in SMALLEST:
        names["generate_input_output"] = _at_least(module.generate_input_output, SMALLEST[task.module])
    if task.name in ESSAY_TASKS:
        words = _enough_words(counter, spec)
        names["get_haystack"] = lambda **_: words
    if task.name in QUESTION_FILES:
        read = "read_squad" if task.name == "ruler_qa_squad" else "read_hotpotqa"
        questions = _questions(module, read, spec)
        names[read] = lambda: questions
    return names


def _call_with(generator: Callable[..., Any], asked: dict[str, int], *args: Any, **kwargs: Any) -> Any:
    """Call a generator for as many samples, and with as much room for answers, as asked for."""
    return generator(*args, **{**kwargs, **asked})


def _with_example(bounded: Callable[..., Any], plain: Callable[..., Any], counter: PromptCounter) -> Callable[..., Any]:
    """Return variable tracking's generator, which first makes the example that precedes every prompt.

    It would never end if the example left no room for a prompt, so that is checked first.
    """

    def generator(*args: Any, **kwargs: Any) -> Any:
        example = kwargs.get("icl_example")
        if example is None:  # makes the example, of the harness's own length
            return plain(*args, **{**kwargs, "tokenizer": counter.count_plain})
        text = f"{example['input']} {' '.join(example['outputs'])}\n\n"
        counter.set_apart(len(counter(text).input_ids))
        if not counter.fits(load_module("vt_utils").generate_input_output(0, num_chains=1, num_hops=4)[0]):
            raise ValueError("no room for a prompt after the example")
        return bounded(*args, **kwargs)

    return generator


def _at_least(make: Callable[..., Any], smallest: int) -> Callable[..., Any]:
    @functools.wraps(make)
    def enough(size: int, *args: Any, **kwargs: Any) -> Any:
        return make(max(size, smallest), *args, **kwargs)

    return enough


def _enough_words(counter: PromptCounter, spec: PromptSpec) -> list[str]:
    words = read_words(list(spec.files))
    # A word has at least one token.
    if len(words) < spec.length:
        num_tokens = len(counter.count_plain(" ".join(words)).input_ids)
        if num_tokens < spec.length:
            raise ValueError(
                f"task.data_dir: the {len(spec.files)} text files in {spec.files[0].absolute().parent} have "
                f"{num_tokens} tokens, too few for task.length={spec.length}; add more text."
            )
    return words


def _questions(module: ModuleType, read: str, spec: PromptSpec) -> tuple[list[dict[str, Any]], list[str]]:
    file = spec.files[0]
    content = read_questions(file)
    try:
        with mock.patch.object(module, "download_json", lambda _: content):
            # Bypasses the harness's cache, which holds one file only.
            questions, documents = getattr(module, read).__wrapped__(str(file))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"task.data_dir: {file.absolute()} differs from the original file ({error!r}); get the original."
        ) from error
    if len(questions) < spec.num_samples:
        raise ValueError(
            f"task.num_samples={spec.num_samples} is more than the {len(questions)} questions in {file.absolute()}."
        )
    return questions, documents


@contextlib.contextmanager
def _seeded(module: ModuleType, seed: str) -> Iterator[None]:
    """Seed the random number generators that the harness uses, and restore the process's own afterwards."""
    import numpy as np

    number = int.from_bytes(hashlib.sha256(seed.encode()).digest()[:4], "big")
    state, numpy_state = random.getstate(), np.random.get_state()
    try:
        random.seed(number)
        np.random.seed(number)
        if hasattr(module, "RNG"):
            module.RNG.seed(number)
        yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)


def sentence_splitter() -> str:
    """Return how essays are split into sentences: with NLTK's trained ``punkt_tab`` if installed, else untrained."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        return "untrained punkt"
    return "punkt_tab"


@contextlib.contextmanager
def _sentences(task: HarnessTask) -> Iterator[None]:
    """Split essays into sentences without a download: this decides only where needles may go."""
    if task.name not in ESSAY_TASKS or sentence_splitter() == "punkt_tab":
        yield
        return
    from nltk.tokenize.punkt import PunktSentenceTokenizer

    logger.info("NLTK's punkt_tab is not installed: essays are split into sentences without it.")
    module = load_module("prepare_niah")
    try:
        with mock.patch.object(module, "sent_tokenize", PunktSentenceTokenizer().tokenize):
            yield
    finally:
        module.cached_sent_tokenize.cache_clear()
