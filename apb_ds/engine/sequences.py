"""Sequences in a batch: what was asked, what was answered so far, and who waits for it."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from apb_ds.engine.choosing import Chooser
from apb_ds.engine.context import Branch
from apb_ds.engine.validation import QueryRequest
from apb_ds.methods.packed import Member
from apb_ds.suffixes import Prefix, Suffix

OnProgress = Callable[[int, int], None]


class Cancelled(Exception):
    """A sequence was cancelled before its answer was complete."""


class Handle:
    """One request of a batch, from `Batch.submit`.

    Attributes
    ----------
    tokens : the answer's ids so far, the same on every rank
    copies_document : whether its suffix begins with the document, which it then does not need itself
    kept_in : the branch that keeps query and answer, if any does
    error : why it ended early; None if it did not. The exception itself on the rank that raised it.
    wait_s : seconds from `submit` to the first token, on this rank
    query_s, decode_s : seconds of the forwards that it took part in, until its first token and after it
    """

    def __init__(
        self,
        request: QueryRequest,
        key: str,
        progress: OnProgress | None,
        on_end: Callable[[Handle], None] | None = None,
    ) -> None:
        self.tokens: list[int] = []
        self.error: BaseException | None = None
        self.wait_s = self.query_s = self.decode_s = 0.0
        self.request = request
        self.kept_in = request.source if request.append and isinstance(request.source, Branch) else None
        self._known_ids = getattr(request.source, "token_ids", None)
        self.key = key  # digest of the request, the same on every rank
        self.progress = progress
        self.on_end = on_end
        self.is_cancelled = False
        self.copies_document = False
        self.is_done = False
        self._submitted = time.perf_counter()

    @property
    def is_outdated(self) -> bool:
        """Whether the context or branch got another turn, or lost one, since the request was checked."""
        return getattr(self.request.source, "token_ids", None) is not self._known_ids

    def cancel(self) -> None:
        """End the request at the next step; tokens so far are kept. Heeded on the group's first rank, from any thread.

        Its result is a `Cancelled` error. Nothing is kept in a branch.
        """
        self.is_cancelled = True

    def result(self) -> Tensor:
        """Return the answer, (1, new_tokens), int64, on the CPU.

        Raises
        ------
        RuntimeError
            Before the request ended.
        Exception
            What ended the request, if that was not its end.
        """
        if not self.is_done:
            raise RuntimeError("the request has not ended; call batch.step() until it has (handle.is_done).")
        if self.error is not None:
            raise self.error
        return torch.tensor([self.tokens], dtype=torch.int64)

    def answered(self) -> None:
        """Note when the first token came."""
        self.wait_s = time.perf_counter() - self._submitted


class Sequence(Member):
    """A request under way: it has a suffix.

    Parameters
    ----------
    prefix : that of the batch without tokens, until the request's document is prefilled
    fed : the last of the prompt's tokens, which its first forward feeds; from then on, the last token
    prompt_ids : (1, tokens), int64, with the query
    chooser : on the first rank only
    """

    def __init__(
        self,
        handle: Handle,
        prefix: Prefix,
        suffix: Suffix,
        fed: list[int],
        reach: int,
        prompt_ids: Tensor,
        chooser: Chooser | None,
    ) -> None:
        super().__init__(prefix, suffix, fed, reach)
        self.handle = handle
        self.prompt_ids = prompt_ids
        self.chooser = chooser

    def add(self, token: int) -> None:
        """Add a token to the answer; it is fed next."""
        self.handle.tokens.append(token)
        self.fed = [token]

    @property
    def all_ids(self) -> Tensor:
        """Prompt and answer so far, (1, tokens), int64, on the prompt's device."""
        new = torch.tensor([self.handle.tokens], dtype=torch.int64, device=self.prompt_ids.device)
        return torch.cat([self.prompt_ids, new], dim=-1)

    def choose(self, logits: Tensor) -> tuple[int, bool]:
        """Choose the next token on the first rank, and say whether it is the last.

        Parameters
        ----------
        logits : (1, vocab), float32
        """
        chooser = self.chooser
        assert chooser is not None
        ids = self.all_ids
        if not self.handle.tokens:
            chooser.begin(ids)
        token = chooser.choose(ids, logits)
        chooser.tell(token)
        ends = chooser.ends(torch.cat([ids, token], dim=-1))
        if ends:
            chooser.end()
        return int(token), ends

    def take(self, token: int) -> tuple[int, bool]:
        """As `choose`, for a token that is the likeliest, of a chooser that `is_plain`."""
        chooser = self.chooser
        assert chooser is not None
        num_after = self.prompt_ids.shape[1] + len(self.handle.tokens) + 1
        ends = token in chooser.end_tokens or num_after >= chooser.max_length
        if chooser.streamer is not None:
            if not self.handle.tokens:
                chooser.begin(self.prompt_ids)
            chooser.tell(torch.tensor([[token]]))
            if ends:
                chooser.end()
        return token, ends
