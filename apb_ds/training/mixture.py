"""Which documents a model is trained on: weighted recipes, one drawn for each document."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from apb_ds.config import check_choice
from apb_ds.tasks.synthetic.draws import Draws
from apb_ds.tasks.synthetic.recipe import Recipe
from apb_ds.training.config import check_number

FIELD = "train.mixture"
SPLIT = "train"
RECIPE_KEYS = tuple(item.name for item in fields(Recipe) if item.name != "split")


@dataclass(frozen=True)
class Part:
    """Recipes of one kind.

    Attributes
    ----------
    weight : how often it is drawn, relative to the other parts
    choices : the possible values of each setting of a recipe, equally likely
    """

    weight: float
    choices: Mapping[str, tuple[Any, ...]]

    def draw(self, draws: Draws) -> Recipe:
        """Return a recipe, drawing a value for every setting."""
        return Recipe(split=SPLIT, **{name: draws.choose(values) for name, values in self.choices.items()})


class Mixture:
    """Recipes to draw from.

    Parameters
    ----------
    parts : list of mappings
        Each with a ``kind``, optionally a ``weight`` (default 1), and settings of `Recipe`; a list holds values to draw
        from.

    Raises
    ------
    ValueError
        For an unknown key, or a combination of values that does not make a recipe.
    """

    def __init__(self, parts: Sequence[Mapping[str, Any]]) -> None:
        if not isinstance(parts, Sequence) or isinstance(parts, str) or not parts:
            raise ValueError(f"{FIELD}={parts!r} must be a list of recipes, such as [{{kind: single}}].")
        self.parts = [_read_part(part) for part in parts]
        self._total = math.fsum(part.weight for part in self.parts)

    def draw(self, draws: Draws) -> Recipe:
        """Return a recipe of a part that is drawn by its weight."""
        left = draws.fraction() * self._total
        for part in self.parts[:-1]:
            if left < part.weight:
                return part.draw(draws)
            left -= part.weight
        return self.parts[-1].draw(draws)


def _read_part(values: Mapping[str, Any]) -> Part:
    if not isinstance(values, Mapping) or "kind" not in values:
        raise ValueError(f"{FIELD}: {values!r} must have a kind, as in {{kind: single}}.")
    values = dict(values)
    weight = values.pop("weight", 1)
    check_number(f"{FIELD}: weight", weight, above=0)
    choices: dict[str, tuple[Any, ...]] = {}
    for name, value in values.items():
        check_choice(f"{FIELD} key", name, ("weight", *RECIPE_KEYS))
        choices[name] = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        if not choices[name]:
            raise ValueError(f"{FIELD}: {name} is an empty list; give a value or leave it out.")
    for combination in itertools.product(*choices.values()):
        try:
            Recipe(split=SPLIT, **dict(zip(choices, combination, strict=True)))
        except ValueError as error:
            raise ValueError(f"{FIELD}: {error}") from error
    return Part(float(weight), choices)
