"""Which documents a model is trained on: recipes with weights, drawn anew for every document."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from apb_ds.config import check_choice
from apb_ds.tasks.synthetic.draws import Draws
from apb_ds.tasks.synthetic.recipe import Recipe

FIELD = "train.mixture"
SPLIT = "train"
RECIPE_KEYS = tuple(item.name for item in fields(Recipe) if item.name != "split")


@dataclass(frozen=True)
class Part:
    """Recipes of one kind.

    Attributes
    ----------
    weight : how often it is drawn, in proportion to the others
    choices : for each setting of a recipe the values that it may have, all as likely
    """

    weight: float
    choices: Mapping[str, tuple[Any, ...]]

    def draw(self, draws: Draws) -> Recipe:
        """Return a recipe with a value drawn for every setting."""
        return Recipe(split=SPLIT, **{name: draws.choose(values) for name, values in self.choices.items()})


class Mixture:
    """Recipes to draw from.

    Parameters
    ----------
    parts : list of mappings
        Each with a ``kind``, optionally a ``weight`` (default 1), and settings of `Recipe`, of which a list stands for
        values to draw from.

    Raises
    ------
    ValueError
        For an unknown key, or a combination of values that is no recipe.
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
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
        raise ValueError(f"{FIELD}: weight={weight!r} must be a number above 0.")
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
