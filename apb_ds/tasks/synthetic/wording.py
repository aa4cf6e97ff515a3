"""In which words a document says things and its questions ask for them: always the same, or drawn for each document.

`plain` words are what evaluation uses. A model that is trained on them alone learns them by heart and little else, so
training has `varied` ones: many ways of saying the same, of which none is a plain one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from apb_ds.tasks.synthetic.draws import Draws
from apb_ds.tasks.synthetic.phrases import (
    ASSIGNMENTS,
    INTRODUCTIONS,
    LIST_QUESTIONS,
    MARKERS,
    SAYINGS,
    SEPARATORS,
    VARIABLE_QUESTIONS,
    WHATS,
    Asking,
    Assignment,
    Saying,
)
from apb_ds.tasks.synthetic.words import (
    Spelling,
    coded_word,
    draw_spelling,
    hyphenated,
    number,
    thing,
    uuid,
)

PHRASINGS = ("plain", "varied")
PLAIN_TASKS = {
    "single": "Somewhere in the text below, a number is kept for a thing. Remember it: I will ask for it afterwards.",
    "multikey_words": "The text below says which number is kept for which thing. I will ask for some of them later.",
    "multikey_uuids": "The text below says which code is kept for which name. I will ask for some of them afterwards.",
    "multivalue": "In the text below, several numbers are kept for one thing. I will ask for all of them afterwards.",
    "multiquery": "The text below says which number is kept for which thing. I will ask for several of them at once.",
    "variables": "In the text below, variables are set, some of them to others. I will ask which ones hold a value.",
    "frequent_words": "Below is a list of made-up words. I will ask afterwards which of them come up most often.",
    "common_words": "Below is a numbered list of words. I will ask afterwards which of them come up most often.",
}
# Shares of a varied list that its marker may have.
MARKER_SHARES = (0.0, 0.0, 0.3, 0.6)


class NeedleWording(Protocol):
    """The words of a document with needles."""

    @property
    def task(self) -> str:
        """What the document begins with."""

    def key(self, draws: Draws) -> str:
        """Return what a question may ask for; for variables, the name of one."""

    def value(self, draws: Draws) -> str:
        """Return what may be kept for a key, or held by a variable."""

    def needle(self, key: str, value: str) -> str:
        """Return the sentence that gives a key its value."""

    def assignment(self, name: str, source: str, *, is_first: bool) -> str:
        """Return the sentence that sets a variable, the first of a chain to a value, the others to a variable."""

    def ask(self, keys: list[str], num_answers: int) -> tuple[str, str]:
        """Return query and answer prefix."""


def needle_wording(phrasing: str, kind: str, split: str, draws: Draws) -> NeedleWording:
    """Return the words of a document; `draws` chooses varied ones."""
    return PlainNeedles(kind, split) if phrasing == "plain" else VariedNeedles.drawn(kind, split, draws)


@dataclass(frozen=True)
class PlainNeedles:
    """The same words for every document of a kind."""

    kind: str
    split: str

    @property
    def task(self) -> str:
        return PLAIN_TASKS[self.kind]

    def key(self, draws: Draws) -> str:
        if self.kind == "variables":
            return coded_word(draws, self.split).upper()
        return uuid(draws) if self.kind == "multikey_uuids" else thing(draws, self.split)

    def value(self, draws: Draws) -> str:
        return uuid(draws) if self.kind == "multikey_uuids" else number(draws)

    def needle(self, key: str, value: str) -> str:
        if self.kind == "multikey_uuids":
            return f"The code kept for {key} is {value}."
        return f"{'One' if self.kind == 'multivalue' else 'The'} number kept for the {key} is {value}."

    def assignment(self, name: str, source: str, *, is_first: bool) -> str:
        return f"Set {name} to {source}."

    def ask(self, keys: list[str], num_answers: int) -> tuple[str, str]:
        key = keys[0]
        if self.kind == "variables":
            query = f"Which {num_answers} variables hold {key}, directly or through other variables? Name all of them."
            return query, f"The {num_answers} variables that hold {key} are"
        if self.kind == "multikey_uuids":
            return f"Which code is kept for {key}?", f"The code kept for {key} is"
        if self.kind == "multivalue":
            return f"Which numbers are kept for the {key}? Name all of them.", f"The numbers kept for the {key} are"
        if self.kind == "multiquery":
            named = ", ".join(f"the {each}" for each in keys[:-1]) + f" and the {keys[-1]}"
            return f"Which numbers are kept for {named}? Name them in this order.", "In this order, the numbers are"
        return f"Which number is kept for the {key}?", f"The number kept for the {key} is"


@dataclass(frozen=True)
class VariedNeedles:
    """Words that were drawn for one document."""

    kind: str
    split: str
    task: str
    what: str
    saying: Saying
    assigning: Assignment
    asking: Asking
    keys: str
    values: Spelling
    names: Spelling

    KEYS = ("thing", "hyphenated", "hyphenated", "coded", "uuid")

    @classmethod
    def drawn(cls, kind: str, split: str, draws: Draws) -> VariedNeedles:
        return cls(
            kind=kind,
            split=split,
            task=draws.choose(INTRODUCTIONS),
            what=draws.choose(WHATS),
            saying=draws.choose(SAYINGS),
            assigning=draws.choose(ASSIGNMENTS),
            asking=draws.choose(VARIABLE_QUESTIONS),
            keys="uuid" if kind == "multikey_uuids" else draws.choose(cls.KEYS),
            values=draw_spelling(draws, ("digits", "digits", "digits", "upper", "lower")),
            names=draw_spelling(draws, ("upper", "upper", "lower", "coded", "mixed")),
        )

    def key(self, draws: Draws) -> str:
        if self.kind == "variables":
            return self.names.draw(draws, self.split)
        if self.keys == "uuid":
            return uuid(draws)
        if self.keys == "coded":
            return f"{coded_word(draws, self.split)}{coded_word(draws, self.split)}"
        return hyphenated(draws, self.split) if self.keys == "hyphenated" else f"the {thing(draws, self.split)}"

    def value(self, draws: Draws) -> str:
        return uuid(draws) if self.kind == "multikey_uuids" else self.values.draw(draws, self.split)

    def needle(self, key: str, value: str) -> str:
        return _capitalised(self.saying.needle.format(key=key, value=value, what=self.what))

    def assignment(self, name: str, source: str, *, is_first: bool) -> str:
        template = self.assigning.first if is_first else self.assigning.next
        return template.format(name=name, source=source)

    def ask(self, keys: list[str], num_answers: int) -> tuple[str, str]:
        if self.kind == "variables":
            return self.asking.format(value=keys[0], num=num_answers)
        if len(keys) > 1:
            named = f"{', '.join(keys[:-1])} and {keys[-1]}"
            return self.saying.ask_many(named, self.what)
        return self.saying.ask_many(keys[0], self.what) if num_answers > 1 else self.saying.ask_one(keys[0], self.what)


@dataclass(frozen=True)
class ListWording:
    """The words of a document that is a list.

    Attributes
    ----------
    task : what the document begins with
    separator : between two entries
    numbered : whether entries have numbers before them
    marker, marker_share : what stands between the entries besides, and how much of the list it is
    """

    task: str
    separator: str
    numbered: bool
    marker: str
    marker_share: float
    asking: Asking | None
    words: Spelling | None
    split: str

    def word(self, draws: Draws) -> str:
        """Return a word that may stand in the list."""
        return coded_word(draws, self.split) if self.words is None else self.words.draw(draws, self.split)

    def text(self, entries: list[str], draws: Draws) -> str:
        """Return the list; `draws` says where markers stand."""
        if self.numbered:
            return self.separator.join(f"{place}. {entry}" for place, entry in enumerate(entries, 1))
        if not self.marker_share:
            return self.separator.join(entries)
        pieces: list[str] = []
        for entry in entries:
            while draws.fraction() < self.marker_share:
                pieces.append(self.marker)
            pieces.append(entry)
        return self.separator.join(pieces)

    def ask(self, num: int, where: str) -> tuple[str, str]:
        """Return query and answer prefix."""
        if self.asking is not None:
            return self.asking.format(num=num, where=where)
        which = "word comes" if num == 1 else f"{num} words come"
        prefix = f"The {'word that comes' if num == 1 else f'{num} words that come'} up most often in {where}"
        return f"Which {which} up most often in {where}?", f"{prefix} {'is' if num == 1 else 'are'}"


def list_wording(phrasing: str, kind: str, split: str, draws: Draws) -> ListWording:
    """Return the words of a list; `draws` chooses varied ones."""
    numbered = kind == "common_words"
    if phrasing == "plain":
        return ListWording(PLAIN_TASKS[kind], "\n" if numbered else " ", numbered, "", 0.0, None, None, split)
    return ListWording(
        task=draws.choose(INTRODUCTIONS),
        separator=draws.choose(("\n", " ") if numbered else SEPARATORS),
        numbered=numbered,
        marker=draws.choose(MARKERS),
        marker_share=draws.choose(MARKER_SHARES),
        asking=draws.choose(LIST_QUESTIONS),
        words=draw_spelling(draws, ("lower", "lower", "coded", "noun")),
        split=split,
    )


def _capitalised(sentence: str) -> str:
    """Return a sentence that begins with an article in upper case; keys that begin one stay as they are."""
    return f"T{sentence[1:]}" if sentence.startswith("the ") else sentence
