"""Scores of answers, from 0 to 1, by the rules of the benchmark (``src/compute_scores.py`` of its repository).

====================  =================================================================================================
passkey,              the first run of digits is the right one
number_string
kv_retrieval          the value is one of the words, between white space and punctuation
longdialogue_qa_eng   the first name, in capitals as in scripts, is one of the words in capitals
longbook_qa_eng       F1 of words, ignoring case, punctuation and articles; the best over the right answers
longbook_qa_chn       F1 of characters, ignoring case, punctuation and spaces; the best over the right answers
longbook_choice_eng   the letter that the answer begins with, that follows "answer is" and the like, or the first letter
                      that stands alone; after "answer is" and the like the option's text is also right
longbook_sum_eng      ROUGE-Lsum's F, one sentence per line; the best over the right summaries
code_run              the last word is the number
code_debug            the answer begins with the letter and "." or ":", or letter or name follow "answer is:" and the
                      like
math_find             the first number is the right one; signs are ignored
math_calc             the share of right values before the first wrong one; signs are ignored
====================  =================================================================================================

Two rules differ from the benchmark's: code_debug accepts a lone letter, and math_find compares a decimal number with an
integer as numbers (the benchmark stops with an error).
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
# The full-width and Chinese punctuation that the benchmark ignores.
CHINESE_PUNCTUATION = re.compile(
    "[\u2013\u2014\u2018\u2019\u201b-\u201f\u2026\u2027\u3001-\u3003\u300b-\u3011\u3014-\u301f\u3030\u303e\u303f"
    "\ufe4f\uff01-\uff0d\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff64]"
)


def check_rouge() -> None:
    """Raise RuntimeError unless the package that scores summaries is installed."""
    if importlib.util.find_spec("rouge_score") is None:
        raise RuntimeError(
            "longbook_sum_eng is scored by the package rouge_score, which is not installed; install it with: "
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
    except ValueError:  # not a number
        return False


def _first_number(prediction: str, answers: Sequence[str]) -> bool:
    found = re.search(r"[0-9]+\.[0-9]+|[0-9]+", prediction)
    return found is not None and Decimal(found.group()) == Decimal(answers[0])


def _right_values(prediction: str, answers: Sequence[str]) -> float:
    """Return the share of values that are right, up to the first wrong one."""
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
    """Return what follows the first opening that the text contains, one character skipped; None if it has none."""
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
    kept = CHINESE_PUNCTUATION.sub("", text.lower())
    return [letter for letter in kept if letter not in string.punctuation and not letter.isspace()]


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
