"""Which kind of document to make, and with which numbers: validated before any text is made."""

from __future__ import annotations

from dataclasses import dataclass

from apb_ds.config import check_choice
from apb_ds.tasks.checks import check_integers, is_number
from apb_ds.tasks.synthetic.filler import FILLERS
from apb_ds.tasks.synthetic.wording import PHRASINGS
from apb_ds.tasks.synthetic.words import CODED_LETTERS, SPLITS, UUID_LETTERS, VALUE_DIGITS

# A choice of `filler`: the document consists of needles only.
NEEDLES = "needles"
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
# Ranks that share the frequencies of `frequent_words`.
NUM_RANKS = 1000
# A default: as many as the questions ask for, see `Recipe.num_groups`.
AS_ASKED = 0
# Tokens for what a model says besides the answers.
SPARE_TOKENS = 16


@dataclass(frozen=True)
class Kind:
    """What a kind of document can be made with.

    Attributes
    ----------
    fillers : what may stand between needles, the default first; empty for documents without needles
    numbers : its numbers and their defaults
    answer_letters : length of one wanted text
    num_answers : which number says how many texts a question asks for; None for one
    """

    fillers: tuple[str, ...]
    numbers: dict[str, float]
    answer_letters: int
    num_answers: str | None = None


AMONG_FILLER = (*FILLERS, NEEDLES)
AMONG_NEEDLES = (NEEDLES, *FILLERS)
KINDS = {
    "single": Kind(FILLERS, {}, VALUE_DIGITS),
    "multikey_words": Kind(AMONG_NEEDLES, {"num_needles": AS_ASKED}, VALUE_DIGITS),
    "multikey_uuids": Kind(AMONG_NEEDLES, {"num_needles": AS_ASKED}, UUID_LETTERS),
    "multivalue": Kind(AMONG_FILLER, {"num_needles": AS_ASKED, "num_values": 4}, VALUE_DIGITS, "num_values"),
    "multiquery": Kind(AMONG_FILLER, {"num_needles": AS_ASKED, "num_keys": 4}, VALUE_DIGITS, "num_keys"),
    "variables": Kind(AMONG_FILLER, {"num_chains": AS_ASKED, "num_hops": 4}, CODED_LETTERS, "num_hops"),
    "frequent_words": Kind((), {"num_words": 3, "exponent": 2.0}, CODED_LETTERS, "num_words"),
    "common_words": Kind((), {"num_words": 10, "common_times": 30, "rare_times": 3}, CODED_LETTERS, "num_words"),
}
# Keys among filler: kinds that need more of them than those asked for.
FEWEST_NEEDLES = {"multikey_words": 4, "multikey_uuids": 4, "variables": 2}


@dataclass(frozen=True)
class Recipe:
    """Settings of a document and its questions; ValueError for one that is out of range or of no use to the kind.

    Parameters
    ----------
    kind : str
        ``single``: a thing and its number. ``multikey_words``, ``multikey_uuids``: one of many such.
        ``multivalue``: a thing with several numbers, all asked for. ``multiquery``: several things asked for at once.
        ``variables``: which variables hold a value, over chains of assignments. ``frequent_words``: the most frequent
        words of a list in which frequency falls with rank. ``common_words``: the words that occur often in a list
        whose other words are rare.
    split : str
        ``train`` or ``eval``: the two share no word, no sentence and no random choice.
    phrasing : str
        ``plain``: always the same phrases. ``varied``: phrases, spellings and separators drawn for each document, for
        training; only with split ``train``.
    num_questions : int
        Questions about one document, each about other keys or another list.
    filler : str
        What stands between needles: ``prose``, ``noise`` (the same few sentences over and over) or ``needles`` (no
        filler, as many further needles as fit). Default: needles for the multikey kinds, prose for the others.
    num_needles : int
        Keys in a document with filler. Default: those asked for, at least 4 for the multikey kinds.
    num_values : int
        ``multivalue``: numbers of each key. Default 4.
    num_keys : int
        ``multiquery``: keys that one question asks for. Default 4.
    num_chains : int
        ``variables``: chains in a document with filler. Default: those asked for, at least 2.
    num_hops : int
        ``variables``: assignments of one variable to another in a chain. Default 4, so five variables hold a value.
    num_words : int
        ``frequent_words``, ``common_words``: words asked for. Default 3 and 10.
    exponent : float
        ``frequent_words``: a word's frequency is proportional to rank ** -exponent. Default 2.
    common_times, rare_times : int
        ``common_words``: how often the wanted words occur, and the others at most. Default 30 and 3.
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
                f"task.phrasing=varied is for task.split=train, not {self.split!r}: evaluation uses the same phrases "
                "in every document; leave it out."
            )
        check_integers(self, num_questions=1)
        fillers = KINDS[self.kind].fillers
        if self.filler is not None and not fillers:
            raise ValueError(f"task.filler={self.filler!r}: task.kind={self.kind} has no filler; leave it out.")
        if self.filler is not None:
            check_choice("task.filler", self.filler, fillers)
        self._check_used(*SMALLEST, "exponent")
        check_integers(self, **SMALLEST)
        exponent = self.exponent
        if exponent is not None and not (is_number(exponent) and 1 < exponent <= MAX_EXPONENT):
            raise ValueError(f"task.exponent={exponent!r} must be a number above 1, at most {MAX_EXPONENT}.")
        self._check_together()

    def _check_used(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and name not in KINDS[self.kind].numbers:
                kinds = ", ".join(kind for kind, has in KINDS.items() if name in has.numbers)
                raise ValueError(
                    f"task.{name}={value!r} is of no use to task.kind={self.kind}; leave it out, or set task.kind to "
                    f"one of {kinds}."
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
                f"{self.number('rare_times')}, or no word is common; raise it."
            )

    @property
    def filler_used(self) -> str | None:
        """What stands between needles; None in documents without needles."""
        fillers = KINDS[self.kind].fillers
        return self.filler or (fillers[0] if fillers else None)

    @property
    def num_answers(self) -> int:
        """How many texts one question asks for."""
        name = KINDS[self.kind].num_answers
        return 1 if name is None else self.number(name) + (self.kind == "variables")

    @property
    def num_asked(self) -> int:
        """How many keys or chains all questions ask for."""
        return self.num_questions * (self.num_answers if self.kind == "multiquery" else 1)

    @property
    def group_size(self) -> int:
        """How many needles each key or chain has."""
        return 1 if self.kind == "multiquery" else self.num_answers

    @property
    def num_groups(self) -> int:
        """How many keys or chains a document has; without filler, the fewest."""
        given = self.num_chains if self.kind == "variables" else self.num_needles
        if given is not None:
            return given
        fewest = FEWEST_NEEDLES.get(self.kind, 1) if self.filler_used in FILLERS else 1
        return max(self.num_asked, fewest)

    @property
    def answer_tokens(self) -> int:
        """How many tokens hold an answer with any tokenizer that has a token for every letter."""
        return self.num_answers * (KINDS[self.kind].answer_letters + 2) + SPARE_TOKENS

    def number(self, name: str) -> int:
        """Return a number as given, or the kind's default."""
        given = getattr(self, name)
        return int(KINDS[self.kind].numbers[name] if given is None else given)
