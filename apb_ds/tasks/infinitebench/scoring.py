"""Scores of answers, from 0 to 1, by the rules of the benchmark (``src/compute_scores.py`` of its repository).

====================  =================================================================================================
passkey,              the first run of digits is the right one
number_string
kv_retrieval          the value is one of the words, between blanks and punctuation
longdialogue_qa_eng   the first of the names, in capitals as scripts have them, is one of the words in capitals
longbook_qa_eng       F1 of words, without case, punctuation and articles; the best over the right answers
longbook_qa_chn       F1 of characters, without case, punctuation and blanks; the best over the right answers
longbook_choice_eng   the letter that the answer begins with, or follows "answer is" and the like, or the first letter
                      on its own; after such words the option's text is right, too
longbook_sum_eng      ROUGE-Lsum's F, sentences being lines; the best over the right summaries
code_run              the last word is the number
code_debug            the answer begins with the letter and "." or ":", or letter or name follow "answer is:" and the
                      like
math_find             the first number is the right one; signs are not looked at
math_calc             the share of right values until the first wrong one; signs are not looked at
====================  =================================================================================================

Where these differ from the benchmark's: for code_debug a lone letter counts, and for math_find a number with decimals
is compared as a number where an integer is right (the benchmark stops with an error).
"""

from __future__ import annotations

import importlib.util
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from decimal import Decimal

from apb_ds.tasks.infinitebench.names import LETTERS

WORD_PUNCTUATION = "\n:\"'.,?!{}"
NUMBER_PUNCTUATION = "\n.`'\":"
CHOICE_PUNCTUATION = "\n\"'.,?!{}"
CHOICE_OPENINGS = ("answer is:", "answer:", "answer is", "option is")
DEBUG_NOISE = re.compile(r"[\n`'\"*-]|[Oo]ption")
DEBUG_OPENINGS = ("answer is:", "is:", "answer:")
ARTICLES = re.compile(r"\b(a|an|the)\b")
# The full-width and Chinese punctuation that the benchmark leaves out, as ranges of code points.
CHINESE_RANGES = (
    (0x2013, 0x2014),
    (0x2018, 0x2019),
    (0x201B, 0x201F),
    (0x2026, 0x2027),
    (0x3001, 0x3003),
    (0x300B, 0x3011),
    (0x3014, 0x301F),
    (0x3030, 0x3030),
    (0x303E, 0x303F),
    (0xFE4F, 0xFE4F),
    (0xFF01, 0xFF0D),
    (0xFF0F, 0xFF0F),
    (0xFF1A, 0xFF20),
    (0xFF3B, 0xFF40),
    (0xFF5B, 0xFF64),
)
CHINESE_PUNCTUATION = frozenset(chr(code) for first, last in CHINESE_RANGES for code in range(first, last + 1))


def check_rouge() -> None:
    """Raise RuntimeError unless the package that scores summaries is there."""
    if importlib.util.find_spec("rouge_score") is None:
        raise RuntimeError(
            "longbook_sum_eng is scored by the package rouge_score, which is missing; install it with: "
            "pip install -e '.[eval]'"
        )


def score(task: str, answers: Sequence[str], prediction: str) -> float:
    """Return how right a prediction is.

    Parameters
    ----------
    answers : as in `Row.answers`
    """
    return float(_RULES[task](prediction.strip(), answers))


def _first_digits(prediction: str, answers: Sequence[str]) -> bool:
    found = re.search("[0-9]+", prediction)
    return found is not None and found.group() == answers[0]


def _has_word(prediction: str, answers: Sequence[str]) -> bool:
    return answers[0] in _words(prediction, WORD_PUNCTUATION)


def _names_character(prediction: str, answers: Sequence[str]) -> bool:
    return answers[0] in _words(prediction.upper(), WORD_PUNCTUATION)


def _last_integer(prediction: str, answers: Sequence[str]) -> bool:
    words = _words(prediction, NUMBER_PUNCTUATION)
    try:
        return bool(words) and int(words[-1]) == int(answers[0])
    except ValueError:  # no number
        return False


def _first_number(prediction: str, answers: Sequence[str]) -> bool:
    found = re.search(r"[0-9]+\.[0-9]+|[0-9]+", prediction)
    return found is not None and Decimal(found.group()) == Decimal(answers[0])


def _right_values(prediction: str, answers: Sequence[str]) -> float:
    """Return which share of the values is right before the first that is not."""
    values = re.findall("[0-9]+", prediction)[: len(answers)]
    wrong = (index for index, value in enumerate(values) if Decimal(value) != Decimal(answers[index]))
    return next(wrong, len(values)) / len(answers)


def _chooses(prediction: str, answers: Sequence[str]) -> bool:
    if not prediction:
        return False
    if prediction[0] in LETTERS:
        return prediction[0] in answers
    if prediction in answers:
        return True
    text = _collapsed(prediction, CHOICE_PUNCTUATION)
    after = _after(text, CHOICE_OPENINGS)
    if after is not None:
        return after.startswith(tuple(answers))
    letters = (word for word in text.split() if word in LETTERS)
    return next(letters, None) in answers


def _finds_bug(prediction: str, answers: Sequence[str]) -> bool:
    name, letter = answers
    if prediction == letter or prediction[:2] in (f"{letter}.", f"{letter}:"):
        return True
    text = re.sub(" +", " ", DEBUG_NOISE.sub(" ", prediction))
    after = _after(text, DEBUG_OPENINGS)
    return after is not None and after.startswith((letter, name))


def _after(text: str, openings: Sequence[str]) -> str | None:
    """Return what follows the first of the openings that is there, and one character; None if there is none."""
    for opening in openings:
        index = text.find(opening)
        if index >= 0:
            return text[index + len(opening) + 1 :]
    return None


def _word_f1(prediction: str, answers: Sequence[str]) -> float:
    return max(_f1(_english_words(prediction), _english_words(answer)) for answer in answers)


def _character_f1(prediction: str, answers: Sequence[str]) -> float:
    return max(_f1(_characters(prediction), _characters(answer)) for answer in answers)


def _rouge(prediction: str, answers: Sequence[str]) -> float:
    check_rouge()
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeLsum"]).score_multi(list(answers), prediction)["rougeLsum"].fmeasure


def _f1(prediction: Sequence[str], answer: Sequence[str]) -> float:
    common = sum((Counter(prediction) & Counter(answer)).values())
    return 2 * common / (len(prediction) + len(answer)) if common else 0.0


def _english_words(text: str) -> list[str]:
    kept = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return ARTICLES.sub(" ", kept).split()


def _characters(text: str) -> list[str]:
    kept = (letter for letter in text.lower() if letter not in string.punctuation)
    return [letter for letter in kept if letter not in CHINESE_PUNCTUATION and not letter.isspace()]


def _words(text: str, punctuation: str) -> list[str]:
    return text.translate(dict.fromkeys(map(ord, punctuation), " ")).split()


def _collapsed(text: str, punctuation: str) -> str:
    return re.sub(" +", " ", text.translate(dict.fromkeys(map(ord, punctuation), " ")))


_RULES: dict[str, Callable[[str, Sequence[str]], float]] = {
    "passkey": _first_digits,
    "number_string": _first_digits,
    "kv_retrieval": _has_word,
    "longdialogue_qa_eng": _names_character,
    "longbook_qa_eng": _word_f1,
    "longbook_qa_chn": _character_f1,
    "longbook_choice_eng": _chooses,
    "longbook_sum_eng": _rouge,
    "code_run": _last_integer,
    "code_debug": _finds_bug,
    "math_find": _first_number,
    "math_calc": _right_values,
}
