"""Decode in lockstep: one rank chooses each token for all.

The chooser, with logits processors, stopping criteria and the streamer, runs on the group's first rank. That broadcasts
the token together with whether to stop, so that neither random states nor clocks can make ranks diverge.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from apb_ds.attention import Phase
from apb_ds.engine.choosing import Chooser
from apb_ds.engine.cuda_graph import RecordedSteps
from apb_ds.hf.interface import ActiveCall
from apb_ds.hf.stages import run_model, stage_of
from apb_ds.parallel.groups import SequenceGroup


@dataclass
class RequestStats:
    """Where the time of the last call went on this rank.

    Attributes
    ----------
    prefill_s : seconds of the prefill, 0 if a context was given
    query_s : seconds until the first token, after the prefill
    decode_s : seconds of all further tokens
    new_tokens : tokens generated
    """

    prefill_s: float = 0.0
    query_s: float = 0.0
    decode_s: float = 0.0
    new_tokens: int = 0


class _Verdict(IntEnum):
    GO_ON = 0
    STOP = 1
    FAILED = 2


def forward_new(model: PreTrainedModel, ids: Tensor, fed: int, cache: Any, kept: int) -> Tensor:
    """Run the tokens that a cache does not hold yet.

    Parameters
    ----------
    ids : (1, tokens), int64, all of them
    fed : how many of them the cache holds
    kept : of how many of the last ones the logits are wanted

    Returns
    -------
    (1, kept, vocab), float32; in a pipeline those of the first rank count
    """
    inputs: dict[str, Any] = {
        "input_ids": ids[:, fed:],
        "position_ids": torch.arange(fed, ids.shape[1], device=ids.device).unsqueeze(0),
        "past_key_values": cache,
        "use_cache": True,
        "logits_to_keep": kept,
    }
    stage = stage_of(model)
    with nullcontext() if stage is None else stage.connected(stage.pipeline.tokens):
        logits = run_model(model, **inputs)
    logits = None if logits is None else logits[:, -kept:].float()
    if stage is not None:
        logits = stage.bring_back([logits], kept, model)
    assert logits is not None
    return logits


class LockstepDecoder:
    """The decoding loop of one sequence, on every rank of a group.

    Parameters
    ----------
    group : SequenceGroup
    call : ActiveCall
        Switched from QUERY to DECODE after the first forward.
    chooser : Chooser
        Used on the group's first rank only.
    synchronize : callable
        Waits for the device, so that times are meaningful.
    recorded : RecordedSteps or None
        Replays forwards of one token where it can.
    """

    def __init__(
        self,
        group: SequenceGroup,
        call: ActiveCall,
        chooser: Chooser,
        synchronize: Callable[[], None],
        recorded: RecordedSteps | None = None,
    ) -> None:
        self.group = group
        self.call = call
        self.recorded = recorded
        self.chooser = chooser
        self.synchronize = synchronize
        self.stats = RequestStats()

    def run(self, model: PreTrainedModel, input_ids: Tensor, cache: Any) -> Tensor:
        """Generate until a criterion stops it. Returns all ids, (1, tokens + new_tokens).

        Parameters
        ----------
        input_ids : (1, tokens), int64
            The prompt; those that the cache does not hold yet are run first.
        cache : ShardedCache
        """
        fed = cache.get_seq_length()
        verdict = _Verdict.GO_ON
        began = time.perf_counter()
        while verdict is _Verdict.GO_ON:
            logits = self._forward(model, input_ids, fed, cache)
            fed = input_ids.shape[1]
            token, verdict = self._choose(input_ids, logits)
            input_ids = torch.cat([input_ids, token], dim=-1)
            began = self._clock(began)
            self.call.start_decoding()
        return input_ids

    def _forward(self, model: PreTrainedModel, input_ids: Tensor, fed: int, cache: Any) -> Tensor:
        """Run the tokens that the cache does not hold yet; return the last one's logits, (1, vocab), float32."""
        if self.recorded is not None:
            logits = self.recorded.run(cache, self.call, input_ids[:, -1:], self.stats.new_tokens)
            if logits is not None:
                return logits
        return forward_new(model, input_ids, fed, cache, kept=1)[:, -1]

    def _choose(self, input_ids: Tensor, logits: Tensor) -> tuple[Tensor, _Verdict]:
        """Return the next token, (1, 1), and whether to go on: the first rank's choice, on every rank."""
        if self.group.world_size == 1:
            return self._decide(input_ids, logits)
        message = torch.zeros(2, dtype=torch.int64, device=input_ids.device)
        failure: BaseException | None = None
        if self.group.is_first:
            try:
                chosen, verdict = self._decide(input_ids, logits)
                message[0], message[1] = chosen[0, 0], int(verdict)
            except Exception as error:  # raised after the broadcast, for which the others wait
                failure = error
                message[1] = int(_Verdict.FAILED)
        self.group.broadcast(message)
        token, code = message[:1].view(1, 1), _Verdict(int(message[1]))
        if failure is not None:
            raise failure
        if code is _Verdict.FAILED:
            raise RuntimeError("the first rank failed while choosing a token; see its message.")
        return token, code

    def _decide(self, input_ids: Tensor, logits: Tensor) -> tuple[Tensor, _Verdict]:
        """Choose a token, (1, 1), and whether to go on; runs on the first rank alone."""
        if self.call.phase is Phase.QUERY:
            self.chooser.begin(input_ids)
        token = self.chooser.choose(input_ids, logits)
        self.chooser.tell(token)
        if not self.chooser.ends(torch.cat([input_ids, token], dim=-1)):
            return token, _Verdict.GO_ON
        self.chooser.end()
        return token, _Verdict.STOP

    def _clock(self, began: float) -> float:
        self.synchronize()
        now = time.perf_counter()
        if self.call.phase is Phase.QUERY:
            self.stats.query_s = now - began
        else:
            self.stats.decode_s += now - began
        self.stats.new_tokens += 1
        return now
