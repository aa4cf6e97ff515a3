"""Documents with needles: sentences that give a key its value, or a variable its own, between sentences of filler."""

from __future__ import annotations

from dataclasses import dataclass

from apb_ds.tasks.synthetic.documents import Question
from apb_ds.tasks.synthetic.draws import Draws
from apb_ds.tasks.synthetic.filler import Filler
from apb_ds.tasks.synthetic.recipe import NEEDLES, Recipe
from apb_ds.tasks.synthetic.words import Distinct, coded_word, number, thing, uuid

TASKS = {
    "single": "Somewhere in the text below, a number is kept for a thing. Remember it: I will ask for it afterwards.",
    "multikey_words": "The text below says which number is kept for which thing. I will ask for some of them later.",
    "multikey_uuids": "The text below says which code is kept for which name. I will ask for some of them afterwards.",
    "multivalue": "In the text below, several numbers are kept for one thing. I will ask for all of them afterwards.",
    "multiquery": "The text below says which number is kept for which thing. I will ask for several of them at once.",
    "variables": "In the text below, variables are set, some of them to others. I will ask which ones hold a value.",
}


@dataclass(frozen=True)
class Group:
    """Needles that belong together.

    Attributes
    ----------
    key : what a question names
    answers : what it wants
    needles : the sentences, in the order in which they stand in the document
    depths : where each stands: the share of the document before it, ascending
    """

    key: str
    answers: tuple[str, ...]
    needles: tuple[str, ...]
    depths: tuple[float, ...]


class NeedleLayout:
    """A document with needles. Its units are sentences of filler or, where there is none, keys with their needles.

    Parameters
    ----------
    recipe : one of a kind with needles
    seed : what determines every choice, together with kind and split
    """

    def __init__(self, recipe: Recipe, seed: tuple[int | str, ...]) -> None:
        self.recipe = recipe
        self._seed = seed
        self._draws = Draws(*seed, "needles")
        self._keys = Distinct(lambda: self._key())
        self._values = Distinct(lambda: self._value())
        self._groups: list[Group] = []
        filler = recipe.filler_used
        self._filler = None if filler in (None, NEEDLES) else Filler(str(filler), recipe.split, Draws(*seed, "filler"))

    @property
    def minimum(self) -> int:
        return self.recipe.num_groups if self._filler is None else 0

    @property
    def num_needed(self) -> int:
        return self.recipe.num_groups * self._group_size

    @property
    def _group_size(self) -> int:
        names = {"variables": "num_hops", "multivalue": "num_values"}
        number = self.recipe.number(names[self.recipe.kind]) if self.recipe.kind in names else 1
        return number + (self.recipe.kind == "variables")

    def text(self, count: int) -> str:
        """Return the text: each needle where its depth puts it among `count` sentences or among the other needles."""
        groups = self._first(self._num_groups(count))
        placed = sorted(pair for group in groups for pair in zip(group.depths, group.needles, strict=True))
        task = TASKS[self.recipe.kind]
        if self._filler is None:
            return "\n".join([task + "\n", *(needle for _, needle in placed)])
        between: list[list[str]] = [[] for _ in range(count + 1)]
        for depth, needle in placed:
            between[int(depth * (count + 1))].append(needle)
        sentences = between[0]
        for sentence, needles in zip(self._filler.sentences(count), between[1:], strict=True):
            sentences += [sentence, *needles]
        return f"{task}\n\n{' '.join(sentences)}"

    def questions(self, count: int) -> tuple[Question, ...]:
        """Return the questions, each about other keys; which ones is drawn."""
        groups = self._first(self._num_groups(count))
        asked = Draws(*self._seed, "questions").sample(len(groups), self.recipe.num_asked)
        per_question = self.recipe.num_asked // self.recipe.num_questions
        return tuple(
            self._question([groups[index] for index in asked[start : start + per_question]])
            for start in range(0, len(asked), per_question)
        )

    def _num_groups(self, count: int) -> int:
        return count if self._filler is None else self.recipe.num_groups

    def _first(self, num: int) -> list[Group]:
        while len(self._groups) < num:
            self._groups.append(self._group(len(self._groups)))
        return self._groups[:num]

    def _group(self, index: int) -> Group:
        kind, size = self.recipe.kind, self._group_size
        if kind == "variables":
            value = self._values[index]
            names = [self._keys[index * size + place] for place in range(size)]
            sources = [value, *names]
            needles = [f"Set {name} to {source}." for name, source in zip(names, sources, strict=False)]
            return Group(value, tuple(names), tuple(needles), self._depths(size))
        key = self._keys[index]
        values = tuple(self._values[index * size + place] for place in range(size))
        return Group(key, values, tuple(_needle(kind, key, value) for value in values), self._depths(size))

    def _depths(self, num: int) -> tuple[float, ...]:
        return tuple(sorted(self._draws.fraction() for _ in range(num)))

    def _key(self) -> str:
        if self.recipe.kind == "variables":
            return coded_word(self._draws, self.recipe.split).upper()
        return uuid(self._draws) if self.recipe.kind == "multikey_uuids" else thing(self._draws, self.recipe.split)

    def _value(self) -> str:
        return uuid(self._draws) if self.recipe.kind == "multikey_uuids" else number(self._draws)

    def _question(self, groups: list[Group]) -> Question:
        keys, answers = [group.key for group in groups], tuple(text for group in groups for text in group.answers)
        return Question(*_ask(self.recipe.kind, keys, len(answers)), answers)


def _needle(kind: str, key: str, value: str) -> str:
    if kind == "multikey_uuids":
        return f"The code kept for {key} is {value}."
    return f"{'One' if kind == 'multivalue' else 'The'} number kept for the {key} is {value}."


def _ask(kind: str, keys: list[str], num_answers: int) -> tuple[str, str]:
    """Return query and answer prefix; only that of `multiquery` names several keys."""
    key = keys[0]
    if kind == "variables":
        query = f"Which {num_answers} variables hold {key}, directly or through other variables? Name all of them."
        return query, f"The {num_answers} variables that hold {key} are"
    if kind == "multikey_uuids":
        return f"Which code is kept for {key}?", f"The code kept for {key} is"
    if kind == "multivalue":
        return f"Which numbers are kept for the {key}? Name all of them.", f"The numbers kept for the {key} are"
    if kind == "multiquery":
        named = ", ".join(f"the {each}" for each in keys[:-1]) + f" and the {keys[-1]}"
        return f"Which numbers are kept for {named}? Name them in this order.", "In this order, the numbers are"
    return f"Which number is kept for the {key}?", f"The number kept for the {key} is"
