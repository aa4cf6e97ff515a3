"""Documents that are lists of made-up words, some of which occur more often than the others."""

from __future__ import annotations

import math

from apb_ds.tasks.synthetic.documents import Question
from apb_ds.tasks.synthetic.draws import Draws
from apb_ds.tasks.synthetic.recipe import NUM_RANKS, Recipe
from apb_ds.tasks.synthetic.wording import list_wording
from apb_ds.tasks.synthetic.words import Distinct

# How many more times a wanted word occurs than the most frequent other word.
MARGIN = 2


class ListLayout:
    """A document of one list per question, with no word in two lists. Its units are the entries that may vary.

    Parameters
    ----------
    recipe : one of kind ``frequent_words`` or ``common_words``
    seed : determines every choice, together with kind and split
    """

    def __init__(self, recipe: Recipe, seed: tuple[int | str, ...]) -> None:
        self.recipe = recipe
        self._seed = seed
        draws = Draws(*seed, "words")
        wording = list_wording(recipe.phrasing, recipe.kind, recipe.split, Draws(*seed, "wording"))
        self._wording = wording
        self._words = Distinct(lambda: wording.word(draws))
        self._shares = _shares(recipe.exponent or 2.0) if recipe.kind == "frequent_words" else []

    @property
    def minimum(self) -> int:
        if self.recipe.kind == "common_words":
            return self.recipe.num_questions
        last = self.recipe.number("num_words") - 1
        # The margin is smallest between the last wanted word and the next; rounding down takes up to 1 off it.
        return self.recipe.num_questions * math.ceil((MARGIN + 1) / (self._shares[last] - self._shares[last + 1]))

    @property
    def num_needed(self) -> int:
        if self.recipe.kind == "frequent_words":
            return self.minimum
        return self.recipe.num_questions * (self.recipe.number("num_words") * self.recipe.number("common_times") + 1)

    def text(self, count: int) -> str:
        """Return the task and the lists, each in an order drawn for this count."""
        lists = [self._list(index, count) for index in range(self.recipe.num_questions)]
        return "\n\n".join([self._wording.task, *lists])

    def questions(self, count: int) -> tuple[Question, ...]:
        """Return one question per list, about its `num_words` most frequent words in the order of their frequency."""
        return tuple(self._question(index) for index in range(self.recipe.num_questions))

    def _question(self, index: int) -> Question:
        num = self.recipe.number("num_words")
        where = "the list" if self.recipe.num_questions == 1 else f"list {index + 1}"
        answers = tuple(self._word(index, rank) for rank in range(num))
        return Question(*self._wording.ask(num, where), answers)

    def _word(self, index: int, rank: int) -> str:
        # Words are dealt to the lists in turn, so that no list shares one, however long the lists grow.
        return self._words[rank * self.recipe.num_questions + index]

    def _list(self, index: int, count: int) -> str:
        num_lists = self.recipe.num_questions
        size = count // num_lists + (index < count % num_lists)
        common = self.recipe.kind == "common_words"
        ranks = self._common_ranks(size) if common else _frequent_ranks(self._shares, size)
        entries = [self._word(index, rank) for rank in ranks]
        Draws(*self._seed, "order", index, size).shuffle(entries)
        head = "" if num_lists == 1 else f"List {index + 1}:\n"
        return head + self._wording.text(entries, Draws(*self._seed, "markers", index))

    def _common_ranks(self, size: int) -> list[int]:
        """Return all entries of the common words, and `size` entries of others."""
        num, times = self.recipe.number("num_words"), self.recipe.number("rare_times")
        common = list(range(num)) * self.recipe.number("common_times")
        return common + [num + entry // times for entry in range(size)]


def _shares(exponent: float) -> list[float]:
    """Return each rank's share of a list, proportional to rank ** -exponent."""
    weights = [rank**-exponent for rank in range(1, NUM_RANKS + 1)]
    total = sum(weights)
    return [weight / total for weight in weights]


def _frequent_ranks(shares: list[float], size: int) -> list[int]:
    """Return `size` ranks, each as often as its share says, rounded down; words that occur once fill the rest."""
    ranks = [rank for rank, share in enumerate(shares) for _ in range(int(share * size))]
    first = ranks[-1] + 1
    return ranks + list(range(first, first + size - len(ranks)))
