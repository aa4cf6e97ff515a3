"""Stop where the answer says a text, by decoding its last few tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

INCOMPLETE = "\ufffd"  # what bytes decode to that are not a whole character
MORE_BYTES = 3  # tokens that a character of UTF-8 may take after its first


class StopText(StoppingCriteria):
    """Stops at the token that completes an occurrence of a text.

    Decides as transformers' `StopStringCriteria`, which first looks at every token of the vocabulary: the text may
    begin in the prompt, and the last token may carry more than its end. Special tokens count as their text.

    Parameters
    ----------
    tokenizer : the model's; only its `decode` is used
    stop_strings : a text or several, none of them empty
    """

    def __init__(self, tokenizer: Any, stop_strings: str | Sequence[str]) -> None:
        self.texts = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings)
        self._tokenizer = tokenizer
        # Every token is at least one byte. One more, because some decoders strip the space of the first one.
        self._window = max(len(text.encode(errors="replace")) for text in self.texts) + 1

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Return whether each row's last token completes a text, (batch,), bool.

        Parameters
        ----------
        input_ids : (batch, tokens), int64, prompt and answer
        """
        rows = input_ids[:, -(self._window + MORE_BYTES) :].tolist()
        return torch.tensor([self._is_completed(row) for row in rows], dtype=torch.bool, device=input_ids.device)

    def _is_completed(self, ids: list[int]) -> bool:
        """Whether the last of a sequence's last ids completes a text."""
        start = max(0, len(ids) - self._window)
        text = self._decode(ids[start:])
        while start > 0 and text.startswith(INCOMPLETE):  # some decoders give up a run of bytes that begins amid one
            start -= 1
            text = self._decode(ids[start:])
        known = self._count_known(ids[start:], text)
        return any(text.find(stop, max(0, known - len(stop) + 1)) >= 0 for stop in self.texts)

    def _count_known(self, ids: list[int], text: str) -> int:
        """Return how many of the text's characters were there before the last token."""
        known = 0
        for end in range(len(ids) - 1, max(0, len(ids) - 2 - MORE_BYTES), -1):
            before = self._decode(ids[:end])
            known = max(known, _count_equal(before, text))
            if not before.endswith(INCOMPLETE):
                break
        return known

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _count_equal(text: str, other: str) -> int:
    """Return how many characters two texts have in common at their beginning."""
    differ = (place for place, (one, two) in enumerate(zip(text, other, strict=False)) if one != two)
    return next(differ, min(len(text), len(other)))
