"""What kind of document is wanted, and with which numbers: validated before any text is made."""

from __future__ import annotations

import math
from dataclasses import dataclass

from apb_ds.config import check_choice, check_integer
from apb_ds.tasks.synthetic.filler import FILLERS
from apb_ds.tasks.synthetic.wording import PHRASINGS
from apb_ds.tasks.synthetic.words import CODED_LETTERS, SPLITS, UUID_LETTERS, VALUE_DIGITS

# In place of filler: the document consists of needles and nothing else.
NEEDLES = "needles"
# The least that each number may be.
SMALLEST = {
    "num_needles": 1,
    "num_values": 2,
    "num_keys": 2,
    "num_chains": 1,
    "num_hops": 1,
    "num_words": 1,
    "common_times": 2,
    "rare_times": 1,
}
MAX_EXPONENT = 8
# Ranks among which the frequencies of `frequent_words` are shared out.
NUM_RANKS = 1000
# Tokens for what a model says besides the answers.
SPARE_TOKENS = 16


@dataclass(frozen=True)
class Kind:
    """What a kind of document can be made with.

    Attributes
    ----------
    fillers : what may stand between the needles, the default first; empty where there is neither
    numbers : the numbers that it has, with their defaults; None depends on the others
    answer_letters : how long one wanted text is
    """

    fillers: tuple[str, ...]
    numbers: dict[str, float | None]
    answer_letters: int


AMONG_FILLER = (*FILLERS, NEEDLES)
AMONG_NEEDLES = (NEEDLES, *FILLERS)
KINDS = {
    "single": Kind(FILLERS, {}, VALUE_DIGITS),
    "multikey_words": Kind(AMONG_NEEDLES, {"num_needles": None}, VALUE_DIGITS),
    "multikey_uuids": Kind(AMONG_NEEDLES, {"num_needles": None}, UUID_LETTERS),
    "multivalue": Kind(AMONG_FILLER, {"num_needles": None, "num_values": 4}, VALUE_DIGITS),
    "multiquery": Kind(AMONG_FILLER, {"num_needles": None, "num_keys": 4}, VALUE_DIGITS),
    "variables": Kind(AMONG_FILLER, {"num_chains": None, "num_hops": 4}, CODED_LETTERS),
    "frequent_words": Kind((), {"num_words": 3, "exponent": 2.0}, CODED_LETTERS),
    "common_words": Kind((), {"num_words": 10, "common_times": 30, "rare_times": 3}, CODED_LETTERS),
}
# Keys among filler, where more of them than those asked for make the task what it is.
FEWEST_NEEDLES = {"multikey_words": 4, "multikey_uuids": 4, "variables": 2}


@dataclass(frozen=True)
class Recipe:
    """Settings of a document and its questions.

    Parameters
    ----------
    kind : str
        ``single``: a thing and its number. ``multikey_words``, ``multikey_uuids``: one among many such.
        ``multivalue``: a thing with several numbers, all of them wanted. ``multiquery``: several things asked for at
        once. ``variables``: which variables hold a value, over chains of assignments. ``frequent_words``: the most
        frequent words of a list in which frequency falls with rank. ``common_words``: the words that come up often
        among words that come up seldom.
    split : str
        ``train`` or ``eval``: no word, no sentence and no choice is shared between the two.
    phrasing : str
        ``plain``: always in the same words. ``varied``: in words, spellings and separators that are drawn for each
        document, for training; with split ``train`` only.
    num_questions : int
        Questions about one document, each about other keys, or about another list.
    filler : str
        What stands between the needles: ``prose``, ``noise`` (the same few sentences over and over) or ``needles``
        (as many further ones as fit, and no filler). Default: needles for the multikey kinds, prose for the others.
    num_needles : int
        Keys in the document, if there is filler. Default: those asked for, at least 4 for the multikey kinds.
    num_values : int
        ``multivalue``: numbers of each key. Default 4.
    num_keys : int
        ``multiquery``: keys that one question asks for. Default 4.
    num_chains : int
        ``variables``: chains in the document, if there is filler. Default: those asked for, at least 2.
    num_hops : int
        ``variables``: assignments of one variable to another in a chain. Default 4, so five variables hold a value.
    num_words : int
        ``frequent_words``, ``common_words``: words that are wanted. Default 3 and 10.
    exponent : float
        ``frequent_words``: a word's frequency is proportional to rank ** -exponent. Default 2.
    common_times, rare_times : int
        ``common_words``: how often the wanted words come up, and at most the others. Default 30 and 3.

    Raises
    ------
    ValueError
        For a value out of its range or of no use to the kind, naming the field and what is allowed.
    """

    kind: str = "single"
    split: str = "eval"
    phrasing: str = "plain"
    num_questions: int = 1
    filler: str | None = None
    num_needles: int | None = None
    num_values: int | None = None
    num_keys: int | None = None
    num_chains: int | None = None
    num_hops: int | None = None
    num_words: int | None = None
    exponent: float | None = None
    common_times: int | None = None
    rare_times: int | None = None

    def __post_init__(self) -> None:
        check_choice("task.kind", self.kind, KINDS)
        check_choice("task.split", self.split, SPLITS)
        check_choice("task.phrasing", self.phrasing, PHRASINGS)
        if self.phrasing == "varied" and self.split != "train":
            raise ValueError(
                f"task.phrasing=varied is for task.split=train, not {self.split!r}: evaluation says the same in every "
                "document; leave it out."
            )
        check_integer("task.num_questions", self.num_questions, 1)
        self._check_filler()
        for name, smallest in SMALLEST.items():
            self._check_used(name)
            if getattr(self, name) is not None:
                check_integer(f"task.{name}", getattr(self, name), smallest)
        self._check_used("exponent")
        exponent = self.exponent
        if exponent is not None and not (_is_number(exponent) and 1 < exponent <= MAX_EXPONENT):
            raise ValueError(f"task.exponent={exponent!r} must be a number above 1, at most {MAX_EXPONENT}.")
        self._check_together()

    def _check_filler(self) -> None:
        if self.filler is None:
            return
        fillers = KINDS[self.kind].fillers
        if not fillers:
            raise ValueError(f"task.filler={self.filler!r}: task.kind={self.kind} has no filler; leave it out.")
        check_choice("task.filler", self.filler, fillers)

    def _check_used(self, name: str) -> None:
        value = getattr(self, name)
        if value is not None and name not in KINDS[self.kind].numbers:
            kinds = ", ".join(kind for kind, has in KINDS.items() if name in has.numbers)
            raise ValueError(
                f"task.{name}={value!r} is of no use to task.kind={self.kind}; leave it out, or set task.kind to one "
                f"of {kinds}."
            )

    def _check_together(self) -> None:
        for name in ("num_needles", "num_chains"):
            value = getattr(self, name)
            if value is None:
                continue
            if self.filler_used == NEEDLES:
                raise ValueError(
                    f"task.{name}={value} is for documents with filler: with task.filler={NEEDLES} there are as many "
                    "as fit; leave it out, or set task.filler to prose or noise."
                )
            if value < self.num_asked:
                raise ValueError(
                    f"task.{name}={value} must be at least the {self.num_asked} that are asked for; raise it or lower "
                    "task.num_questions."
                )
        if self.kind == "frequent_words" and self.number("num_words") >= NUM_RANKS:
            raise ValueError(f"task.num_words={self.num_words} must be below {NUM_RANKS} for task.kind={self.kind}.")
        if self.kind == "common_words" and self.number("common_times") <= self.number("rare_times"):
            raise ValueError(
                f"task.common_times={self.number('common_times')} must be above task.rare_times="
                f"{self.number('rare_times')}, or nothing is common; raise it."
            )

    @property
    def filler_used(self) -> str | None:
        """What stands between the needles; None where there are none."""
        fillers = KINDS[self.kind].fillers
        return self.filler or (fillers[0] if fillers else None)

    @property
    def num_asked(self) -> int:
        """How many keys or chains all questions ask for."""
        return self.num_questions * (self.number("num_keys") if self.kind == "multiquery" else 1)

    @property
    def num_groups(self) -> int:
        """How many keys or chains there are, at least if there is no filler."""
        given = self.num_chains if self.kind == "variables" else self.num_needles
        if given is not None:
            return given
        fewest = FEWEST_NEEDLES.get(self.kind, 1) if self.filler_used in FILLERS else 1
        return max(self.num_asked, fewest)

    @property
    def answer_tokens(self) -> int:
        """How many tokens hold an answer in any tokenizer that has a token for every letter."""
        numbers = {
            "multivalue": "num_values",
            "multiquery": "num_keys",
            "frequent_words": "num_words",
            "common_words": "num_words",
        }
        num_answers = self.number(numbers[self.kind]) if self.kind in numbers else 1
        if self.kind == "variables":
            num_answers = self.number("num_hops") + 1
        return num_answers * (KINDS[self.kind].answer_letters + 2) + SPARE_TOKENS

    def number(self, name: str) -> int:
        """Return a number as it was given, or the kind's default."""
        given = getattr(self, name)
        value = KINDS[self.kind].numbers[name] if given is None else given
        assert value is not None
        return int(value)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
