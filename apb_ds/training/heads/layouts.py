"""Documents of real text for `apb_ds.tasks.synthetic`: with needles, or with a passage to quote."""

from __future__ import annotations

from apb_ds.tasks.synthetic.documents import Question
from apb_ds.tasks.synthetic.needles import NeedleLayout
from apb_ds.tasks.synthetic.recipe import Recipe
from apb_ds.training.heads.texts import TextFiller


class TextNeedles(NeedleLayout):
    """Needles between pieces of real text, each on a separate line; the text's lines are unchanged."""

    joint = "\n"

    def __init__(self, recipe: Recipe, seed: tuple[int | str, ...], filler: TextFiller) -> None:
        super().__init__(recipe, seed)
        self._filler = _WithoutLastBreak(filler)  # type: ignore[assignment]


class _WithoutLastBreak:
    def __init__(self, filler: TextFiller) -> None:
        self._of = filler

    def sentences(self, num: int) -> list[str]:
        return [piece.removesuffix("\n") for piece in self._of.sentences(num)]


class QuoteLayout:
    """Real text and a question that names one passage and asks for the next.

    Parameters
    ----------
    filler : TextFiller
    depth : share of the text before the passage, from 0 to 1
    """

    minimum = 2
    num_needed = 2

    def __init__(self, filler: TextFiller, depth: float) -> None:
        self._filler = filler
        self._depth = depth

    def text(self, count: int) -> str:
        """Return the first `count` pieces."""
        return "".join(self._filler.sentences(count))

    def questions(self, count: int) -> tuple[Question, ...]:
        """Return the one question."""
        place = int(self._depth * (count - 1))
        named, wanted = self._filler.sentences(count)[place : place + 2]
        query = f"Which passage of the text comes right after this one? Quote it.\n\n{named.strip()}"
        return (Question(query, "The passage is:", (wanted.strip(),)),)
