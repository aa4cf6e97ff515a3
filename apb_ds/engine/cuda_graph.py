"""A decode step over fixed buffers: recorded once as a CUDA graph, replayed for every token.

A small model's step is mostly kernel launches; a replay launches them as one. A recording holds the buffers of a cache.
Once that cache is freed, the next one of similar length takes its buffers over, and the recording serves it at once.

On several ranks the step has a collective in every layer. Ranks may mix replaying and running kernel by kernel, which
send the same messages, but recording runs the step one extra time: all ranks record at the same token, or none does.
"""

from __future__ import annotations

import logging
import operator
import weakref
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from apb_ds.attention import Phase
from apb_ds.cache import ShardedCache
from apb_ds.hf.architecture import walk
from apb_ds.hf.interface import ActiveCall
from apb_ds.hf.rotary import is_position_dependent_rope
from apb_ds.ops.kernels import KernelChoice
from apb_ds.parallel.groups import SequenceGroup
from apb_ds.utils.text import first_line

# Recording costs about as much as a few steps, so it does not pay for short answers.
RECORD_AFTER = 3

logger = logging.getLogger(__name__)


class DecodeStep:
    """A forward of one token that reads its inputs from the device: token, position and shard length.

    Parameters
    ----------
    device : torch.device
    group : SequenceGroup
        The ranks that share the cache.
    """

    def __init__(self, device: torch.device, group: SequenceGroup) -> None:
        self._group = group
        self._token = torch.zeros((1, 1), dtype=torch.int64, device=device)
        self._position = torch.zeros((1, 1), dtype=torch.int64, device=device)
        # By `LayerAttention.window`, since layers with windows store other tokens than the rest.
        self._slots: dict[int | None, Tensor] = {}
        self._num_keys: dict[int | None, Tensor] = {}
        self._graph: torch.cuda.CUDAGraph | None = None
        self._logits: Tensor | None = None
        self._bytes_sent = 0  # in one step
        self.buffers: list[Tensor] = []
        self._weights: list[int] = []

    def fits(self, cache: ShardedCache) -> bool:
        """Whether the recording reads and writes this cache, after making room for one more token."""
        buffers = cache.buffers(num_new=1)
        return len(buffers) == len(self.buffers) and all(map(operator.is_, buffers, self.buffers))

    def serves(self, model: nn.Module, cache: ShardedCache) -> bool:
        """Whether it `fits` the cache, there is a key to attend to, and the model's weights are where they were."""
        return self.fits(cache) and _has_keys(cache) and self._weights == weights_of(model)

    def prepare(self, model: nn.Module, cache: ShardedCache) -> None:
        """Bind the step to the buffers of a cache and the model's weights."""
        self.buffers, self._weights = cache.buffers(num_new=1), weights_of(model)
        device = self._token.device
        self._slots = {window: torch.zeros(1, dtype=torch.int64, device=device) for window in cache.local_lengths()}
        self._num_keys = {window: torch.ones(1, dtype=torch.int32, device=device) for window in self._slots}
        cache.clear_unused()  # a later cache that takes the buffers over must not find NaN in them

    def warm_up(self, model: nn.Module, cache: ShardedCache, call: ActiveCall) -> None:
        """Run the step once over the buffers of `cache`, so that no first-use set-up is recorded."""
        self.prepare(model, cache)
        self._set(self._token, cache)
        side_stream = torch.cuda.Stream()
        side_stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side_stream):
            self.forward(model, cache, call)
        torch.cuda.current_stream().wait_stream(side_stream)

    def record(self, model: nn.Module, cache: ShardedCache, call: ActiveCall) -> None:
        """Record the step over the buffers that it was warmed up with, without computing or sending anything."""
        sent_before = self._group.bytes_sent
        self._graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
                self._logits = self.forward(model, cache, call)
        finally:
            self._bytes_sent = self._group.bytes_sent - sent_before
            self._group.count_bytes(-self._bytes_sent)

    def run(self, model: nn.Module, cache: ShardedCache, call: ActiveCall, token: Tensor) -> Tensor:
        """Feed one token, (1, 1) int64; return its logits, (1, vocab), float32, to be read before the next step."""
        self._set(token, cache)
        if self._graph is None or self._logits is None:
            logits = self.forward(model, cache, call)
        else:
            self._graph.replay()
            self._group.count_bytes(self._bytes_sent)
            logits = self._logits
        cache.advance()
        return logits

    def forward(self, model: nn.Module, cache: ShardedCache, call: ActiveCall) -> Tensor:
        """Run the model on what the inputs hold; the cache does not count the token."""
        with call.attending_to_first(self._num_keys), cache.writing_to(self._slots):
            output = model(
                input_ids=self._token,
                position_ids=self._position,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
                return_dict=True,
            )
        return output.logits[:, -1].float()

    def _set(self, token: Tensor, cache: ShardedCache) -> None:
        self._token.copy_(token)
        self._position.fill_(cache.get_seq_length())
        for window, length in cache.local_lengths().items():
            self._slots[window].fill_(length)
        for window, length in cache.local_lengths(with_next=True).items():
            self._num_keys[window].fill_(length)


class RecordedSteps:
    """An engine's last recorded decode step, which keeps the memory of one cache.

    Parameters
    ----------
    model : nn.Module
    group : SequenceGroup
        The ranks that share a request; all of them have one of these.
    """

    def __init__(self, model: nn.Module, group: SequenceGroup) -> None:
        self._model = (model,)  # no part of a module tree
        self._group = group
        self._step: DecodeStep | None = None
        self._has_failed = False
        self._user: weakref.ref[ShardedCache] | None = None

    def lend_buffers(self, cache: ShardedCache) -> None:
        """Give a new cache the recorded step's buffers if the cache that they were made for was freed."""
        if self._step is None or (self._user is not None and self._user() is not None):
            return
        if cache.take_over(self._step.buffers):
            self._user = weakref.ref(cache)
        else:
            self._step = None  # the new cache needs the memory

    def let_go(self, cache: ShardedCache) -> None:
        """Free the recorded step if it was made for this cache, whose buffers are to be freed."""
        if self._user is not None and self._user() is cache:
            self._step = self._user = None

    def run(self, cache: ShardedCache, call: ActiveCall, token: Tensor, num_done: int) -> Tensor | None:
        """Feed one token to a recorded step; return its logits, or None if no recording fits.

        Parameters
        ----------
        token : (1, 1), int64
        num_done : tokens of this answer so far, including this one
        """
        if self._has_failed or call.phase is not Phase.DECODE:
            return None
        model = self._model[0]
        if num_done == 1 and not self._all(self._step is not None and self._step.serves(model, cache), token.device):
            self._step = None
        if num_done == 1 and self._step is not None:
            cache.clear_unused()  # an earlier document or a dropped query may have left NaN behind the tokens
        if self._is_to_record(cache, num_done):
            self._step = None  # the old one's memory first
            self._record(cache, call, token.device)
        if self._step is None or not self._step.fits(cache):
            return None
        return self._step.run(model, cache, call, token)

    def _is_to_record(self, cache: ShardedCache, num_done: int) -> bool:
        """Whether to record before the next token. With several ranks, only what all of them know may decide it.

        There, a rank whose buffers had to grow runs kernel by kernel until the answer ends.
        """
        if self._group.world_size > 1:
            return self._step is None and num_done == RECORD_AFTER
        return num_done >= RECORD_AFTER and (self._step is None or not self._step.fits(cache))

    def _record(self, cache: ShardedCache, call: ActiveCall, device: torch.device) -> None:
        """Record a step on all ranks together; if that fails on one of them, none has it or tries again."""
        if not self._all(_has_keys(cache), device):
            return
        step, model = DecodeStep(device, self._group), self._model[0]
        failure: RuntimeError | None = None
        try:
            step.warm_up(model, cache, call)
        except RuntimeError as error:
            if self._group.world_size > 1:
                raise  # the others are in its collectives
            failure = error
        try:
            if failure is None:
                step.record(model, cache, call)
        except RuntimeError as error:  # something in the model waits for the device, or memory ran out
            failure = error
        if self._all(failure is None, device):
            self._step, self._user = step, weakref.ref(cache)
            return
        self._has_failed = True
        if failure is not None:
            logger.warning("Decoding without a CUDA graph: the step cannot be recorded (%s).", first_line(failure))

    def _all(self, mine: bool, device: torch.device) -> bool:
        """Return whether it is true on all ranks; all of them call this together."""
        if self._group.world_size == 1:
            return mine
        return bool(self._group.all_gather(torch.tensor([mine], dtype=torch.int64, device=device)).all())


def can_record(model: nn.Module, kernels: Iterable[KernelChoice]) -> bool:
    """Whether decode steps can be recorded with these kernels and the model's rotary embedding."""
    waits = any(is_position_dependent_rope(module) for module in model.modules())
    return all(choice.recorded is not None for choice in kernels) and not waits


def _has_keys(cache: ShardedCache) -> bool:
    """Whether all layers have a key on this rank once the next token has come; a recorded kernel needs one."""
    return min(cache.local_lengths(with_next=True).values()) > 0


def weights_of(model: nn.Module) -> list[int]:
    """Return where the weights are, which a recording reads there."""
    found = (parameter for module in walk(model) for parameter in module._parameters.values())
    return [parameter.data_ptr() for parameter in found if parameter is not None]
