"""Random choices that are the same on every machine and in every version of Python."""

from __future__ import annotations

import hashlib
import random
from collections.abc import MutableSequence, Sequence
from typing import TypeVar

Item = TypeVar("Item")


class Draws:
    """A stream of choices that its seed determines.

    Python promises to keep ``random()`` as it is, but no other method of its generator, so only that one is used.

    Parameters
    ----------
    seed : determines the stream; other values give an unrelated one
    """

    def __init__(self, *seed: int | str) -> None:
        digest = hashlib.sha256(repr(seed).encode()).digest()
        self._random = random.Random(int.from_bytes(digest, "big"))

    def fraction(self) -> float:
        """Return a number in [0, 1)."""
        return self._random.random()

    def below(self, bound: int) -> int:
        """Return an integer in [0, bound)."""
        return int(self._random.random() * bound)

    def choose(self, items: Sequence[Item]) -> Item:
        """Return one of the items, all equally likely."""
        return items[self.below(len(items))]

    def shuffle(self, items: MutableSequence[Item]) -> None:
        """Shuffle the items in place, all orders equally likely."""
        for last in range(len(items) - 1, 0, -1):
            other = self.below(last + 1)
            items[last], items[other] = items[other], items[last]

    def sample(self, bound: int, num: int) -> list[int]:
        """Return `num` different integers in [0, bound), in the order drawn."""
        drawn: dict[int, None] = {}
        if 2 * num > bound:
            numbers = list(range(bound))
            self.shuffle(numbers)
            return numbers[:num]
        while len(drawn) < num:
            drawn[self.below(bound)] = None
        return list(drawn)
