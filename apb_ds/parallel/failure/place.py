"""Where this process is in its work, so that a failure can say it: phase, round and layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Place:
    """A place in a run. Rounds and layers count from 0 inside, from 1 where they are shown.

    Attributes
    ----------
    phase : such as "prefill", "query" or "decode"
    round_index, num_rounds : of a prefill, else None
    layer_idx : of the layer whose attention was entered last, None outside of a forward
    """

    phase: str
    round_index: int | None = None
    num_rounds: int | None = None
    layer_idx: int | None = None

    def __str__(self) -> str:
        parts = [self.phase]
        if self.round_index is not None:
            parts.append(f"round {self.round_index + 1} of {self.num_rounds}")
        if self.layer_idx is not None:
            parts.append(f"layer {self.layer_idx + 1}")
        return ", ".join(parts)


START = Place("start")
BETWEEN = Place("between forwards")

_here = START


def enter(place: Place) -> None:
    """Note where this process is. After an error the note stays: it says where that was."""
    global _here
    _here = place


def here() -> Place:
    """Return where this process is."""
    return _here
