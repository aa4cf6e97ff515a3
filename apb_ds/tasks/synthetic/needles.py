"""Documents with needles: sentences that give a key its value, or a variable its own, between sentences of filler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from apb_ds.tasks.synthetic.documents import Question
from apb_ds.tasks.synthetic.draws import Draws
from apb_ds.tasks.synthetic.filler import Filler
from apb_ds.tasks.synthetic.recipe import NEEDLES, Recipe
from apb_ds.tasks.synthetic.wording import needle_wording
from apb_ds.tasks.synthetic.words import Distinct


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

    joint: ClassVar[str] = " "  # between sentences

    def __init__(self, recipe: Recipe, seed: tuple[int | str, ...]) -> None:
        self.recipe = recipe
        self._seed = seed
        self._draws = Draws(*seed, "needles")
        words = needle_wording(recipe.phrasing, recipe.kind, recipe.split, Draws(*seed, "wording"))
        self._wording = words
        self._keys = Distinct(lambda: words.key(self._draws))
        self._values = Distinct(lambda: words.value(self._draws))
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
        task = self._wording.task
        if self._filler is None:
            return "\n".join([task + "\n", *(needle for _, needle in placed)])
        between: list[list[str]] = [[] for _ in range(count + 1)]
        for depth, needle in placed:
            between[int(depth * (count + 1))].append(needle)
        sentences = between[0]
        for sentence, needles in zip(self._filler.sentences(count), between[1:], strict=True):
            sentences += [sentence, *needles]
        return f"{task}\n\n{self.joint.join(sentences)}"

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
            pairs = enumerate(zip(names, sources, strict=False))
            needles = [self._wording.assignment(*pair, is_first=place == 0) for place, pair in pairs]
            return Group(value, tuple(names), tuple(needles), self._depths(size))
        key = self._keys[index]
        values = tuple(self._values[index * size + place] for place in range(size))
        return Group(key, values, tuple(self._wording.needle(key, value) for value in values), self._depths(size))

    def _depths(self, num: int) -> tuple[float, ...]:
        return tuple(sorted(self._draws.fraction() for _ in range(num)))

    def _question(self, groups: list[Group]) -> Question:
        keys, answers = [group.key for group in groups], tuple(text for group in groups for text in group.answers)
        return Question(*self._wording.ask(keys, len(answers)), answers)
