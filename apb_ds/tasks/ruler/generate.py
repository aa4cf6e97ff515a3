"""Samples from lm-evaluation-harness' generators: as many as asked for, from the user's files, without a download.

The generators take their number of samples, tokenizer and sources from names in their modules. Those names are
replaced while a generator runs, and put back: prompts are made by the harness' code alone.
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

from apb_ds.tasks.ruler.harness import HarnessTask, load_module, quiet, replaced
from apb_ds.tasks.ruler.names import ESSAY_TASKS, QUESTION_FILES
from apb_ds.tasks.ruler.prompts import PromptCounter
from apb_ds.tasks.ruler.sources import read_questions, read_words

# The function of each module that makes the samples, 500 unless told otherwise.
GENERATORS = {
    "niah_utils": "generate_samples",
    "cwe_utils": "sys_word_pair_random",
    "fwe_utils": "sys_kwext",
    "vt_utils": "sys_vartrack_w_noise_random",
    "qa_utils": "generate_samples",
}
# With fewer words, or lines of noise, these modules would make nothing sensible, or try for ever.
SMALLEST = {"cwe_utils": 20, "vt_utils": 5}
# The harness takes essays by so many words; where not even these fit, it hides its needles in a handful.
ESSAY_WORDS = 500

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """Which samples are wanted: how many, how long (tokens, answer included), from which files."""

    length: int
    num_samples: int
    max_new_tokens: int
    seed: int
    files: tuple[Path, ...] = ()


def generate(task: HarnessTask, tokenizer: Any, request: Request) -> list[dict[str, Any]]:
    """Return the harness' samples: ``input``, ``gen_prefix`` and ``outputs`` of each.

    Questions whose own documents do not fit are left out, so there may be fewer than asked for; a warning says so.

    Raises
    ------
    ValueError
        If not one fits.
    """
    module = load_module(task.module)
    counter = PromptCounter(tokenizer, task.name, request.max_new_tokens, request.length)
    with contextlib.ExitStack() as stack:
        stack.enter_context(replaced(module, **_replacements(task, module, counter, request)))
        stack.enter_context(_sentences(task))
        stack.enter_context(_seeded(module, f"{request.seed}/{task.name}/{request.length}"))
        stack.enter_context(quiet())
        try:
            made = getattr(module, task.function)(max_seq_lengths=[request.length])["test"]
        except ValueError as error:
            raise _too_short(task, request) from error
    scanty = task.name in ESSAY_TASKS and any(len(row["input"].split()) < ESSAY_WORDS for row in made)
    if counter.gave_up or scanty:
        raise _too_short(task, request)
    if len(made) < request.num_samples:
        logger.warning(
            "%s: only %d of %d samples fit into task.length=%d.",
            task.name,
            len(made),
            request.num_samples,
            request.length,
        )
    return [{name: row[name] for name in ("input", "gen_prefix", "outputs")} for row in made]


def _too_short(task: HarnessTask, request: Request) -> ValueError:
    return ValueError(
        f"task.length={request.length} is too short for {task.name} with this tokenizer: its shortest prompt and an "
        f"answer of {request.max_new_tokens} tokens do not fit; raise task.length."
    )


def _replacements(task: HarnessTask, module: ModuleType, counter: PromptCounter, request: Request) -> dict[str, Any]:
    """Return what stands in for names of the module while it makes samples."""
    names: dict[str, Any] = {"get_tokenizer": lambda *_, **__: counter}
    generator = GENERATORS[task.module]
    names[generator] = _bounded(getattr(module, generator), request)
    if task.module in SMALLEST:
        names["generate_input_output"] = _at_least(module.generate_input_output, SMALLEST[task.module])
    if task.name == "ruler_vt":
        names[generator] = _with_example(names[generator], getattr(module, generator), counter)
    if task.name in ESSAY_TASKS:
        words = _enough_words(counter, request)
        names["get_haystack"] = lambda **_: words
    if task.name in QUESTION_FILES:
        read = "read_squad" if task.name == "ruler_qa_squad" else "read_hotpotqa"
        questions = _questions(module, read, request)
        names[read] = lambda: questions
    return names


def _bounded(generator: Callable[..., Any], request: Request) -> Callable[..., Any]:
    """Return a generator that makes no more samples than asked for, with room for the answers that are asked for."""
    asked = {"num_samples": request.num_samples, "tokens_to_generate": request.max_new_tokens}
    return lambda *args, **kwargs: generator(*args, **{**kwargs, **asked})


def _with_example(bounded: Callable[..., Any], plain: Callable[..., Any], counter: PromptCounter) -> Callable[..., Any]:
    """Return variable tracking's generator: it first makes the example that precedes every prompt.

    If the example leaves no room for a prompt it would try for ever, so that is found out before.
    """

    def generator(*args: Any, **kwargs: Any) -> Any:
        example = kwargs.get("icl_example")
        if example is None:  # one, of the harness' own length
            return plain(*args, **{**kwargs, "tokenizer": counter.count_plain})
        text = f"{example['input']} {' '.join(example['outputs'])}\n\n"
        counter.set_apart(len(counter(text).input_ids))
        if not counter.fits(load_module("vt_utils").generate_input_output(0, num_chains=1, num_hops=4)[0]):
            raise ValueError("no room for a prompt behind the example")
        return bounded(*args, **kwargs)

    return generator


def _at_least(make: Callable[..., Any], smallest: int) -> Callable[..., Any]:
    @functools.wraps(make)
    def enough(size: int, *args: Any, **kwargs: Any) -> Any:
        return make(max(size, smallest), *args, **kwargs)

    return enough


def _enough_words(counter: PromptCounter, request: Request) -> list[str]:
    words = read_words(list(request.files))
    # A word has a token at least.
    if len(words) < request.length:
        num_tokens = len(counter.count_plain(" ".join(words)).input_ids)
        if num_tokens < request.length:
            raise ValueError(
                f"task.data_dir: the {len(request.files)} text files in {request.files[0].absolute().parent} have "
                f"{num_tokens} tokens, too few for task.length={request.length}; add more text."
            )
    return words


def _questions(module: ModuleType, read: str, request: Request) -> tuple[list[dict[str, Any]], list[str]]:
    file = request.files[0]
    content = read_questions(file)
    try:
        with replaced(module, download_json=lambda _: content):
            # Behind the harness' cache, which knows one file only.
            questions, documents = getattr(module, read).__wrapped__(str(file))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"task.data_dir: {file.absolute()} has other contents than the original file ({error!r}); get that."
        ) from error
    if len(questions) < request.num_samples:
        raise ValueError(
            f"task.num_samples={request.num_samples} is more than the {len(questions)} questions in {file.absolute()}."
        )
    return questions, documents


@contextlib.contextmanager
def _seeded(module: ModuleType, seed: str) -> Iterator[None]:
    """Seed every generator of random numbers that the harness draws from; the process' own go on as they were."""
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
    """Return how essays are cut into sentences: with NLTK's trained ``punkt_tab`` if that is there, else untrained."""
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        return "untrained punkt"
    return "punkt_tab"


@contextlib.contextmanager
def _sentences(task: HarnessTask) -> Iterator[None]:
    """Let essays be cut into sentences without a download: needles go between them, nothing else depends on it."""
    if task.name not in ESSAY_TASKS or sentence_splitter() == "punkt_tab":
        yield
        return
    from nltk.tokenize.punkt import PunktSentenceTokenizer

    logger.info("NLTK's punkt_tab is not installed: sentences of essays are told apart without it.")
    module = load_module("prepare_niah")
    try:
        with replaced(module, sent_tokenize=PunktSentenceTokenizer().tokenize):
            yield
    finally:
        module.cached_sent_tokenize.cache_clear()
