"""How far a rank has got, for failure reports: phase, round and layer."""

from __future__ import annotations


class Progress:
    """How far a rank has got, as text. After an error it stays as it was, so it says where the error happened.

    The process watch reads it from another thread: each change is one assignment.
    """

    def __init__(self) -> None:
        self._text = "start"

    def enter_layer(
        self, phase: str, layer_idx: int, round_index: int | None = None, num_rounds: int | None = None
    ) -> None:
        """The rank enters a layer's attention. Indices count from 0 here, from 1 in the text; a prefill has rounds."""
        in_round = "" if round_index is None else f"round {round_index + 1} of {num_rounds}, "
        self._text = f"{phase}, {in_round}layer {layer_idx + 1}"

    def await_stage(self, stage: int) -> None:
        """The rank waits for hidden states of a pipeline's stage, counted from 0 here and from 1 in the text."""
        self._text = f"waiting for stage {stage + 1}"

    def leave_model(self) -> None:
        """The rank has finished its forwards."""
        self._text = "between forwards"

    def __str__(self) -> str:
        return self._text
