"""Keys, values and made-up words. The splits share no word: made-up words of the two begin with other syllables."""

from __future__ import annotations

import string
from collections.abc import Callable
from dataclasses import dataclass

from apb_ds.tasks.synthetic.draws import Draws
from apb_ds.tasks.texts import read_texts

SPLITS = ("train", "eval")
VALUE_DIGITS = 7
CODED_LETTERS = 6
UUID_PARTS = (8, 4, 4, 4, 12)
UUID_LETTERS = sum(UUID_PARTS) + len(UUID_PARTS) - 1
# How often a word may repeat an earlier one before we conclude that hardly any others are left.
MAX_REPEATS = 1000


def dealt(items: list[str] | tuple[str, ...] | str) -> dict[str, tuple[str, ...]]:
    """Return each split's share of some items, or of the words of a text: every other one."""
    items = items.split() if isinstance(items, str) else items
    return {split: tuple(items[index :: len(SPLITS)]) for index, split in enumerate(SPLITS)}


ADJECTIVES_OF = dealt(read_texts("synthetic/words")["adjectives"])
NOUNS_OF = dealt(read_texts("synthetic/words")["nouns"])
SYLLABLES = tuple(consonant + vowel for vowel in "aeiou" for consonant in "bdfgklmnprstvz")
FIRST_SYLLABLES_OF = dealt(SYLLABLES)


@dataclass(frozen=True)
class Spelling:
    """What the keys or values of one document look like.

    Attributes
    ----------
    kind : ``thing`` (the brisk lantern of Kavomi), ``hyphenated`` (brisk-lantern, sometimes with a third word),
        ``coded`` (kavomi), ``coded_upper``, ``coded_pair``, ``noun_pair``, ``uuid``, ``number`` (seven digits), or
        random ones: ``digits``, ``upper``, ``lower`` (letters), ``mixed`` (a letter and digits)
    length : letters or digits of random ones
    """

    kind: str
    length: int = 0

    def draw(self, draws: Draws, split: str) -> str:
        """Return a key or value."""
        adjectives, nouns = ADJECTIVES_OF[split], NOUNS_OF[split]
        match self.kind:
            case "thing":
                adjective, noun = draws.choose(adjectives), draws.choose(nouns)
                return f"the {adjective} {noun} of {coded_word(draws, split).capitalize()}"
            case "hyphenated":
                words = [draws.choose(adjectives), draws.choose(nouns)]
                return "-".join(words if draws.below(4) else [*words, draws.choose(nouns)])
            case "coded":
                return coded_word(draws, split)
            case "coded_upper":
                return coded_word(draws, split).upper()
            case "coded_pair":
                return coded_word(draws, split) + coded_word(draws, split)
            case "noun_pair":
                return draws.choose(nouns) + draws.choose(nouns)
            case "uuid":
                return "-".join(_letters(draws, "0123456789abcdef", part) for part in UUID_PARTS)
            case "number":
                return number(draws)
            case "digits":
                return draws.choose("123456789") + _letters(draws, string.digits, self.length - 1)
            case "mixed":
                return draws.choose(string.ascii_lowercase) + _letters(draws, string.digits, self.length - 1)
            case "upper":
                return _letters(draws, string.ascii_uppercase, self.length)
            case "lower":
                return _letters(draws, string.ascii_lowercase, self.length)
        raise AssertionError(f"unknown kind of spelling: {self.kind}")


def draw_spelling(draws: Draws, *kinds: str) -> Spelling:
    """Return one of these kinds, with a length."""
    kind = draws.choose(kinds)
    return Spelling(kind, 5 + draws.below(3 if kind == "digits" else 2))


def coded_word(draws: Draws, split: str) -> str:
    """Return a made-up word of six letters, such as ``kavomi``; none contains another."""
    return draws.choose(FIRST_SYLLABLES_OF[split]) + draws.choose(SYLLABLES) + draws.choose(SYLLABLES)


def number(draws: Draws) -> str:
    """Return a uniformly drawn number of seven digits."""
    smallest = 10 ** (VALUE_DIGITS - 1)
    return str(smallest + draws.below(9 * smallest))


def _letters(draws: Draws, alphabet: str, num: int) -> str:
    return "".join(draws.choose(alphabet) for _ in range(num))


class Distinct:
    """A growing list of different texts. An entry depends on its index only, not on the order of look-ups.

    Parameters
    ----------
    draw : returns a text, possibly one that was drawn before
    """

    def __init__(self, draw: Callable[[], str]) -> None:
        self._draw = draw
        self._items: list[str] = []
        self._seen: set[str] = set()

    def __getitem__(self, index: int) -> str:
        while len(self._items) <= index:
            self._items.append(self._new())
        return self._items[index]

    def _new(self) -> str:
        for _ in range(MAX_REPEATS):
            item = self._draw()
            if item not in self._seen:
                self._seen.add(item)
                return item
        raise ValueError(
            f"after {len(self._items)} different words, such as {self._items[0]!r}, hardly any others are left; lower "
            "task.num_tokens."
        )
