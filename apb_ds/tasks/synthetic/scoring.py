"""How much of what was wanted an answer holds."""

from __future__ import annotations

import re
from collections.abc import Sequence


def score(prediction: str, answers: Sequence[str]) -> float:
    """Return the share of the wanted texts that stand in the prediction, in [0, 1].

    Upper and lower case are the same. A text counts only as a whole word: 123 does not stand in 51234.

    Raises
    ------
    ValueError
        If nothing is wanted.
    """
    wanted = {answer.casefold() for answer in answers}
    if not wanted or not all(wanted):
        raise ValueError(f"answers={list(answers)!r} must hold at least one text, and none that is empty.")
    given = prediction.casefold()
    return sum(bool(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", given)) for answer in wanted) / len(wanted)
