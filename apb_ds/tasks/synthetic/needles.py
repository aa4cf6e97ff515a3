"""Documents with needles: sentences that give a key or a variable its value, between sentences of filler."""

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
class NeedleGroup:
    """Needles about one key, or about one chain of variables.

    Attributes
    ----------
    key : what a question names
    answers : what it asks for
    needles : the sentences, in document order
    depths : each needle's depth: the share of the document before it, ascending
    """

    key: str
    answers: tuple[str, ...]
    needles: tuple[str, ...]
    depths: tuple[float, ...]


class NeedleLayout:
    """A document with needles. Its units are sentences of filler or, without filler, keys with their needles.

    Parameters
    ----------
    recipe : one of a kind with needles
    seed : determines every choice, together with kind and split
    """

    joint: ClassVar[str] = " "  # between sentences

    def __init__(self, recipe: Recipe, seed: tuple[int | str, ...]) -> None:
        self.recipe = recipe
        self._seed = seed
        self._draws = Draws(*seed, "needles")
        wording = needle_wording(recipe.phrasing, recipe.kind, recipe.split, Draws(*seed, "wording"))
        self._wording = wording
        self._keys = Distinct(lambda: wording.key(self._draws))
        self._values = Distinct(lambda: wording.value(self._draws))
        self._groups: list[NeedleGroup] = []
        filler = recipe.filler_used
        self._filler = None if filler in (None, NEEDLES) else Filler(str(filler), recipe.split, Draws(*seed, "filler"))

    @property
    def minimum(self) -> int:
        return self.recipe.num_groups if self._filler is None else 0

    @property
    def num_needed(self) -> int:
        return self.recipe.num_groups * self.recipe.group_size

    def text(self, count: int) -> str:
        """Return the text, with each needle at its depth among `count` sentences or among the other needles."""
        groups = self._first(self._num_groups(count))
        needles = sorted(pair for group in groups for pair in zip(group.depths, group.needles, strict=True))
        task = self._wording.task
        if self._filler is None:
            return "\n".join([task + "\n", *(needle for _, needle in needles)])
        between: list[list[str]] = [[] for _ in range(count + 1)]
        for depth, needle in needles:
            between[int(depth * (count + 1))].append(needle)
        sentences = between[0]
        for sentence, inserted in zip(self._filler.sentences(count), between[1:], strict=True):
            sentences += [sentence, *inserted]
        return f"{task}\n\n{self.joint.join(sentences)}"

    def questions(self, count: int) -> tuple[Question, ...]:
        """Return the questions, each about other keys, which are drawn."""
        groups = self._first(self._num_groups(count))
        asked = Draws(*self._seed, "questions").sample(len(groups), self.recipe.num_asked)
        per_question = self.recipe.num_asked // self.recipe.num_questions
        return tuple(
            self._question([groups[index] for index in asked[start : start + per_question]])
            for start in range(0, len(asked), per_question)
        )

    def _num_groups(self, count: int) -> int:
        return count if self._filler is None else self.recipe.num_groups

    def _first(self, num: int) -> list[NeedleGroup]:
        while len(self._groups) < num:
            self._groups.append(self._group(len(self._groups)))
        return self._groups[:num]

    def _group(self, index: int) -> NeedleGroup:
        size = self.recipe.group_size
        members = range(index * size, (index + 1) * size)
        if self.recipe.kind == "variables":
            key, answers = self._values[index], tuple(self._keys[member] for member in members)
            links = zip(answers, (key, *answers), strict=False)
            needles = [self._wording.assign(*link, is_first=number == 0) for number, link in enumerate(links)]
        else:
            key, answers = self._keys[index], tuple(self._values[member] for member in members)
            needles = [self._wording.needle(key, value) for value in answers]
        depths = sorted(self._draws.fraction() for _ in members)
        return NeedleGroup(key, answers, tuple(needles), tuple(depths))

    def _question(self, groups: list[NeedleGroup]) -> Question:
        keys, answers = [group.key for group in groups], tuple(text for group in groups for text in group.answers)
        if self.recipe.kind == "variables":
            return Question(*self._wording.ask_variables(keys[0], len(answers)), answers)
        return Question(*self._wording.ask_values(keys, len(answers)), answers)
