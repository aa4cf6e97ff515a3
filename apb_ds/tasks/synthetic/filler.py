"""Sentences unrelated to what is asked: prose from templates, or the same few over and over."""

from __future__ import annotations

from apb_ds.tasks.synthetic.draws import Draws
from apb_ds.tasks.synthetic.words import ADJECTIVES_OF, NOUNS_OF, dealt
from apb_ds.tasks.texts import read_texts

FILLERS = ("prose", "noise")
TEMPLATES_OF, ROLES_OF, PLACES_OF, TIMES_OF = (
    dealt(read_texts("synthetic/filler")[name]) for name in ("templates", "roles", "places", "times")
)
NOISE: dict[str, list[str]] = read_texts("synthetic/filler")["noise"]


class Filler:
    """An endless sequence of sentences; the first ones are the same however many are asked for.

    Parameters
    ----------
    kind : ``prose`` or ``noise``
    split : which templates and words are used
    draws : chooses the templates and words of prose
    """

    def __init__(self, kind: str, split: str, draws: Draws) -> None:
        self.kind = kind
        self.split = split
        self._draws = draws
        self._sentences: list[str] = []

    def sentences(self, num: int) -> list[str]:
        """Return the first `num` sentences."""
        noise = NOISE[self.split]
        while len(self._sentences) < num:
            index = len(self._sentences) % len(noise)
            self._sentences.append(self._prose() if self.kind == "prose" else noise[index])
        return self._sentences[:num]

    def _prose(self) -> str:
        draws, split = self._draws, self.split
        roles, places = (
            [of[split][index] for index in draws.sample(len(of[split]), 2)] for of in (ROLES_OF, PLACES_OF)
        )
        time = draws.choose(TIMES_OF[split])
        return draws.choose(TEMPLATES_OF[split]).format(
            adjective=draws.choose(ADJECTIVES_OF[split]),
            noun=draws.choose(NOUNS_OF[split]),
            role=roles[0],
            role2=roles[1],
            place=places[0],
            place2=places[1],
            time=time,
            Time=time[0].upper() + time[1:],
        )
