"""How many of the wanted texts an answer contains."""

from __future__ import annotations

import re
from collections.abc import Sequence


def score(prediction: str, answers: Sequence[str]) -> float:
    """Return the share of the answers that the prediction contains, in [0, 1].

    Case is ignored. Only whole words count: 51234 does not contain 123.

    Raises
    ------
    ValueError
        If there are no answers, or an empty one.
    """
    wanted = {answer.casefold() for answer in answers}
    if not wanted or not all(wanted):
        raise ValueError(f"answers={list(answers)!r} must have at least one text, none of them empty.")
    given = prediction.casefold()
    return sum(bool(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", given)) for answer in wanted) / len(wanted)
