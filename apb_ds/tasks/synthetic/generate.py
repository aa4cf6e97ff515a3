"""From a recipe and a seed to a document."""

from __future__ import annotations

from collections.abc import Callable

from apb_ds.tasks.synthetic.documents import Document, Layout, longest
from apb_ds.tasks.synthetic.lists import ListLayout
from apb_ds.tasks.synthetic.needles import NeedleLayout
from apb_ds.tasks.synthetic.recipe import KINDS, Recipe


def generate(recipe: Recipe, seed: int | str, num_tokens: int, length: Callable[[str], int]) -> Document:
    """Return a document that fills `num_tokens` as far as whole sentences or words allow, with its questions.

    The same arguments give the same document on every machine. The two splits draw independently.

    Parameters
    ----------
    recipe : what to make
    seed : an integer, or a text that stands for one
    num_tokens : the document's length at most
    length : returns a text's tokens, chat template included

    Raises
    ------
    ValueError
        If `num_tokens` cannot hold the task, or is so large that the made-up words run out.
    """
    whole_seed = (recipe.split, recipe.kind, str(seed), num_tokens)
    layout: Layout = (NeedleLayout if KINDS[recipe.kind].fillers else ListLayout)(recipe, whole_seed)
    return longest(layout, num_tokens, length)
