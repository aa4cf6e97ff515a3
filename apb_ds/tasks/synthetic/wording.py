"""How a document says things and how its questions ask for them.

Evaluation uses ``plain`` phrases, the same in every document. A model trained on those alone memorises them and learns
little else, so training uses ``varied`` ones, drawn for each document; none of them is a plain one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from apb_ds.tasks.synthetic.draws import Draws
from apb_ds.tasks.synthetic.words import Spelling, draw_spelling
from apb_ds.tasks.texts import read_texts

PHRASINGS = ("plain", "varied")
# Choices for a varied list's markers, as a share of the list; and for a varied document's keys.
MARKER_SHARES = (0.0, 0.0, 0.3, 0.6)
VARIED_KEYS = ("thing", "hyphenated", "hyphenated", "coded_pair", "uuid")


def ask(phrases: Any, num_answers: int, **values: object) -> tuple[str, str]:
    """Return query and answer prefix with the values filled in.

    Parameters
    ----------
    phrases : a pair of templates, or one pair for ``one`` answer and one for ``many``
    """
    if isinstance(phrases, dict):
        phrases = phrases["one" if num_answers == 1 else "many"]
    query, prefix = phrases
    return query.format(**values), prefix.format(**values)


@dataclass(frozen=True)
class NeedleWording:
    """The phrases of a document with needles.

    Attributes
    ----------
    task : the document's opening sentence
    saying : how a needle gives a key its value (``needle``), and how it is asked for
    assignment : how the first variable of a chain is set to a value, and each further one to the variable before it
    variable_question : how the variables of a chain are asked for
    keys, values : what they look like; a variable's name is a key
    what : what a varied saying calls the value
    """

    split: str
    task: str
    saying: dict[str, Any]
    assignment: tuple[str, str]
    variable_question: Any
    keys: Spelling
    values: Spelling
    what: str = ""

    def key(self, draws: Draws) -> str:
        """Return a new key."""
        return self.keys.draw(draws, self.split)

    def value(self, draws: Draws) -> str:
        """Return a new value."""
        return self.values.draw(draws, self.split)

    def needle(self, key: str, value: str) -> str:
        """Return the sentence that gives a key its value."""
        sentence = self.saying["needle"].format(key=key, value=value, what=self.what)
        return f"T{sentence[1:]}" if sentence.startswith("the ") else sentence

    def assign(self, name: str, source: str, *, is_first: bool) -> str:
        """Return the sentence that sets a variable: the first of a chain to a value, the others to a variable."""
        return self.assignment[0 if is_first else 1].format(name=name, source=source)

    def ask_values(self, keys: list[str], num_answers: int) -> tuple[str, str]:
        """Return query and answer prefix for the values of some keys."""
        named = keys[0] if len(keys) == 1 else f"{', '.join(keys[:-1])} and {keys[-1]}"
        return ask(self.saying, num_answers, key=named, what=self.what)

    def ask_variables(self, value: str, num_answers: int) -> tuple[str, str]:
        """Return query and answer prefix for the variables that hold a value."""
        return ask(self.variable_question, num_answers, value=value, num=num_answers)


def needle_wording(phrasing: str, kind: str, split: str, draws: Draws) -> NeedleWording:
    """Return the phrases of a document; `draws` chooses varied ones."""
    phrases, is_uuid = read_texts("synthetic/phrases")[phrasing], kind == "multikey_uuids"
    if phrasing == "plain":
        sayings = phrases["sayings"]
        return NeedleWording(
            split=split,
            task=phrases["tasks"][kind],
            saying=sayings.get(kind, sayings["number"]),
            assignment=phrases["assignment"],
            variable_question=phrases["variable_question"],
            keys=Spelling("uuid" if is_uuid else "coded_upper" if kind == "variables" else "thing"),
            values=Spelling("uuid" if is_uuid else "number"),
        )
    # The order of the draws decides which documents a seed gives.
    task, what = draws.choose(phrases["tasks"]), draws.choose(phrases["whats"])
    saying, assignment = draws.choose(phrases["sayings"]), draws.choose(phrases["assignments"])
    question = draws.choose(phrases["variable_questions"])
    keys = Spelling("uuid" if is_uuid else draws.choose(VARIED_KEYS))
    values = draw_spelling(draws, "digits", "digits", "digits", "upper", "lower")
    names = draw_spelling(draws, "upper", "upper", "lower", "coded", "mixed")
    return NeedleWording(
        split=split,
        task=task,
        saying=saying,
        assignment=assignment,
        variable_question=question,
        keys=names if kind == "variables" else keys,
        values=Spelling("uuid") if is_uuid else values,
        what=what,
    )


@dataclass(frozen=True)
class ListWording:
    """The phrases of a document that is a list.

    Attributes
    ----------
    task : the document's opening sentence
    separator : between two entries
    numbered : whether entries are numbered
    question : how the most frequent words are asked for
    words : what they look like
    marker, marker_share : what also stands between entries, and its share of the list
    """

    split: str
    task: str
    separator: str
    numbered: bool
    question: Any
    words: Spelling
    marker: str = ""
    marker_share: float = 0.0

    def word(self, draws: Draws) -> str:
        """Return a new word of the list."""
        return self.words.draw(draws, self.split)

    def text(self, entries: list[str], draws: Draws) -> str:
        """Return the list; `draws` decides where markers stand."""
        if self.numbered:
            return self.separator.join(f"{number}. {entry}" for number, entry in enumerate(entries, 1))
        if not self.marker_share:
            return self.separator.join(entries)
        pieces: list[str] = []
        for entry in entries:
            while draws.fraction() < self.marker_share:
                pieces.append(self.marker)
            pieces.append(entry)
        return self.separator.join(pieces)

    def ask(self, num: int, where: str) -> tuple[str, str]:
        """Return query and answer prefix for the `num` most frequent words."""
        return ask(self.question, num, num=num, where=where)


def list_wording(phrasing: str, kind: str, split: str, draws: Draws) -> ListWording:
    """Return the phrases of a list; `draws` chooses varied ones."""
    phrases, numbered = read_texts("synthetic/phrases")[phrasing], kind == "common_words"
    if phrasing == "plain":
        separator, question = "\n" if numbered else " ", phrases["list_question"]
        return ListWording(split, phrases["tasks"][kind], separator, numbered, question, Spelling("coded"))
    task = draws.choose(phrases["tasks"])
    separator = draws.choose(("\n", " ") if numbered else phrases["separators"])
    marker, marker_share = draws.choose(phrases["markers"]), draws.choose(MARKER_SHARES)
    question = draws.choose(phrases["list_questions"])
    words = draw_spelling(draws, "lower", "lower", "coded", "noun_pair")
    return ListWording(split, task, separator, numbered, question, words, marker, marker_share)
