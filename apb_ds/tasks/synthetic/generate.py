"""From a recipe and a seed to a document."""

from __future__ import annotations

from collections.abc import Callable

from apb_ds.tasks.synthetic.documents import Document, Layout, longest
from apb_ds.tasks.synthetic.lists import ListLayout
from apb_ds.tasks.synthetic.needles import NeedleLayout
from apb_ds.tasks.synthetic.recipe import KINDS, Recipe


def generate(recipe: Recipe, seed: int | str, num_tokens: int, length: Callable[[str], int]) -> Document:
    """Return a document of at most `num_tokens`, as near to it as its sentences or words allow, with its questions.

    The same arguments give the same document, on every machine. The seeds of the two splits are unrelated.

    Parameters
    ----------
    recipe : what to make
    seed : an integer, or a text that stands for one
    num_tokens : the most that `length` may say of the text
    length : the number of tokens of a text, and of whatever the chat template puts around it

    Raises
    ------
    ValueError
        If `num_tokens` cannot hold the task, or is so large that there are no further words.
    """
    whole_seed = (recipe.split, recipe.kind, str(seed), num_tokens)
    layout: Layout = (NeedleLayout if KINDS[recipe.kind].fillers else ListLayout)(recipe, whole_seed)
    return longest(layout, num_tokens, length)
