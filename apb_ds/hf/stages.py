"""A model as a stage of a pipeline: some of its decoder layers, with what receives and sends their hidden states.

The model's own forward runs on every stage. Layers of other stages are replaced by modules that hand hidden states on;
the one before a stage's first layer receives them from the stage before, and the one after its last layer sends them to
the next stage and ends the forward. The first stage alone has the embeddings, the last one alone the head.
"""

from __future__ import annotations

import logging
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from apb_ds.hf.architecture import decoder_layers, replace_module, text_config, text_decoder
from apb_ds.hf.interface import ForwardComplete
from apb_ds.hf.probe import probe_model
from apb_ds.parallel.consistency import shared_outcome
from apb_ds.parallel.groups import SequenceGroup
from apb_ds.parallel.pipeline import Channel, PendingReceive, Pipeline
from apb_ds.utils.sizes import LayerAttention

LOAD_AGAIN = "load the model again with stages=1."  # it has been cut by then

logger = logging.getLogger(__name__)

_of_models: weakref.WeakKeyDictionary[nn.Module, Stage] = weakref.WeakKeyDictionary()


class Stage:
    """What this rank computes of a model, which it cuts in place.

    Parameters
    ----------
    model : transformers decoder, whole, with or without data; other stages' layers, embeddings and head are dropped
    pipeline : the ranks
    mine : the decoder layers of this stage, by default as `stage_layers` says

    Attributes
    ----------
    pipeline : as given
    layers : the decoder layers of this stage
    dtype : of the hidden states that travel between stages
    """

    def __init__(self, model: PreTrainedModel, pipeline: Pipeline, mine: range | None = None) -> None:
        check_stageable(model, pipeline.num_stages)
        layers = decoder_layers(model)
        self.pipeline = pipeline
        if mine is None:
            of_stages = stage_layers(model, pipeline.num_stages)
            mine = of_stages[pipeline.stage]
            if pipeline.group.is_first:
                spans = ", ".join(f"{one.start + 1} to {one.stop}" for one in of_stages)
                logger.info("The model is cut into %d stages: layers %s.", pipeline.num_stages, spans)
        self.layers = mine
        self._hidden_size: int = text_config(model).hidden_size
        self._is_probed = False
        self._messages: _Messages | None = None
        self.dtype = model.dtype
        for layer_idx, layer in enumerate(layers):
            if layer_idx not in self.layers:
                replace_module(model, layer, self._in_place_of(layer, layer_idx))
        embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
        if not pipeline.is_first:
            replace_module(model, embeddings, _OtherStagesEmbeddings(embeddings))
        if not pipeline.is_last:
            replace_module(model, head, _OtherStagesHead(head))
        _of_models[model] = self

    def like(self, model: PreTrainedModel) -> Stage:
        """Cut another model to the same layers, whatever parts of its weights are here."""
        return Stage(model, self.pipeline, self.layers)

    @property
    def description(self) -> str:
        """Which layers this stage has."""
        first, last = self.layers.start + 1, self.layers.stop
        return f"stage {self.pipeline.stage + 1} of {self.pipeline.num_stages}, layers {first} to {last}"

    @classmethod
    def of(cls, model: PreTrainedModel, group: SequenceGroup, num_stages: int) -> Stage:
        """Return a model's stage: the one that it has been cut to, else it is cut now. All ranks call this together."""
        return _of_models.get(model) or cls(model, Pipeline.of(group, num_stages))

    def _in_place_of(self, layer: nn.Module, layer_idx: int) -> OtherStagesLayer:
        of_neighbours = {self.layers.start - 1: self._receive, self.layers.stop: self._send}
        return OtherStagesLayer(layer, layer_idx, of_neighbours.get(layer_idx))

    @contextmanager
    def probed(self) -> Iterator[None]:
        """Have forwards in this context send and receive nothing: they begin with hidden states that are made up."""
        self._is_probed = True
        try:
            yield
        finally:
            self._is_probed = False

    @contextmanager
    def connected(
        self, channel: Channel, lengths: Iterable[int] = (), device: torch.device | None = None
    ) -> Iterator[None]:
        """Have the forwards in this context receive and send through a channel; one may have others inside it.

        On leaving, all has been sent.

        Parameters
        ----------
        lengths : of these forwards, tokens each, if what a forward needs is to be received while the one before it
            computes. Between them there may then be no message of another kind, and no waiting for the device.
        device : of what is received then
        """
        before, self._messages = self._messages, _Messages(channel, self._hidden_size, self.dtype)
        try:
            if not self.pipeline.is_first and device is not None:
                self._messages.announce(lengths, device)
            yield
            channel.finish_sending()
        finally:
            self._messages = before

    def _receive(self, hidden: Tensor) -> Tensor:
        if self._is_probed:
            made_up = torch.linspace(-1, 1, self._hidden_size, dtype=hidden.dtype, device=hidden.device)
            return made_up.expand(*hidden.shape[:-1], -1)
        self.pipeline.group.progress.await_stage(self.pipeline.stage - 1)
        return self._connection.receive(hidden)

    def _send(self, hidden: Tensor) -> Tensor:
        if self._is_probed:
            self._check_sent(hidden)
        else:
            self._connection.channel.start_sending(hidden)
        raise ForwardComplete

    @property
    def _connection(self) -> _Messages:
        if self._messages is None:
            raise RuntimeError("this rank has a stage of the model alone; it runs in calls of the engine.")
        return self._messages

    def _check_sent(self, hidden: Any) -> None:
        """Raise ValueError unless a layer gives hidden states that can be sent."""
        if not isinstance(hidden, Tensor) or hidden.dim() != 3 or hidden.shape[-1] != self._hidden_size:
            got = tuple(hidden.shape) if isinstance(hidden, Tensor) else type(hidden).__name__
            raise ValueError(f"its layers pass on more than hidden states ({got}); {LOAD_AGAIN}")
        self.dtype = hidden.dtype

    def all_layers(self, mine: Sequence[LayerAttention]) -> tuple[LayerAttention, ...]:
        """Gather how each layer of the whole model attends from the stages, each of which knows its own.

        All ranks call this together.

        Raises
        ------
        ValueError
            If a layer attends to what another one stores, which may be in another stage.
        """
        found: dict[int, LayerAttention] = {}
        everyone = self.pipeline.group.gather_objects((self.pipeline.stage, self.layers, tuple(mine), self.dtype))
        for stage, layers, of_stage, _ in everyone:
            is_here = stage == self.pipeline.stage
            found |= {
                idx: replace(one, stage=stage, is_here=is_here) for idx, one in zip(layers, of_stage, strict=True)
            }
        self.dtype = everyone[0][-1]  # as the first stage sends it
        for layer_idx, layer in found.items():
            if not layer.stores:
                raise ValueError(f"layer {layer_idx} attends to what another layer stores; {LOAD_AGAIN}")
        return tuple(found[layer_idx] for layer_idx in sorted(found))

    def bring_back(self, logits: Sequence[Tensor | None], num_tokens: int, like: Any) -> Tensor:
        """Return the logits of several forwards, one after the other, on the first of all ranks.

        Parameters
        ----------
        logits : as `run_model` returned them, (1, tokens, vocab) each
        num_tokens : of all of them together
        like : the model

        Returns
        -------
        (1, num_tokens, vocab), float32; on other ranks than the first and those of the last stage, zeros
        """
        found = [part.float() for part in logits if part is not None]
        if found:
            return self.pipeline.bring_back(torch.cat(found, dim=1))
        vocab_size = like.get_output_embeddings().out_features
        return self.pipeline.bring_back(torch.zeros((1, num_tokens, vocab_size), device=like.device))


class _Messages:
    """What a stage receives and sends in some forwards that follow each other."""

    def __init__(self, channel: Channel, hidden_size: int, dtype: torch.dtype) -> None:
        self.channel = channel
        self._hidden_size = hidden_size
        self._dtype = dtype
        self._announced: deque[tuple[int, torch.device]] = deque()
        self._coming: PendingReceive | None = None

    def announce(self, lengths: Iterable[int], device: torch.device) -> None:
        """Start to receive each forward's hidden states while the one before it computes, so many tokens each."""
        self._announced.extend((num_tokens, device) for num_tokens in lengths)
        self._start_next()

    def receive(self, like: Tensor) -> Tensor:
        """Return a forward's hidden states, (1, tokens, hidden), for as many tokens as the tensor has."""
        coming, self._coming = self._coming or self._start(like.shape[1], like.device), None
        received = coming.wait()
        self._start_next()
        return received

    def _start_next(self) -> None:
        if self._announced:
            self._coming = self._start(*self._announced.popleft())

    def _start(self, num_tokens: int, device: torch.device) -> PendingReceive:
        return self.channel.start_receiving((1, num_tokens, self._hidden_size), self._dtype, device)


class OtherStagesLayer(nn.Module):
    """Stands for a decoder layer of another stage: hands on hidden states, (1, tokens, hidden), or sends them.

    Models may look at what their layers say of themselves, such as how they attend; that stays.
    """

    def __init__(self, layer: nn.Module, layer_idx: int, pass_on: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        self.elsewhere_idx = layer_idx
        self._pass_on = pass_on
        for name, value in vars(layer).items():
            if not name.startswith("_") and isinstance(value, (str, int, float, type(None))):
                setattr(self, name, value)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return hidden_states if self._pass_on is None else self._pass_on(hidden_states)


class _OtherStagesEmbeddings(nn.Module):
    """Stands for the embeddings, of which the model takes shape, dtype and device: what is received replaces them.

    NaN shows whether something else than the layers reads them.
    """

    def __init__(self, embeddings: Any) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = embeddings.num_embeddings, embeddings.embedding_dim
        self._dtype = embeddings.weight.dtype

    def forward(self, input_ids: Tensor) -> Tensor:
        shape = (*input_ids.shape, self.embedding_dim)
        return torch.full(shape, torch.nan, dtype=self._dtype, device=input_ids.device)


class _OtherStagesHead(nn.Module):
    """Stands for the head, which no forward of an earlier stage comes to."""

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.in_features, self.out_features = head.in_features, head.out_features


def stage_of(model: nn.Module) -> Stage | None:
    """Return what a model has been cut to; None for a whole one."""
    return _of_models.get(model)


def run_model(model: Any, **inputs: Any) -> Tensor | None:
    """Run a forward of a model, or of a stage that is `Stage.connected`; return its logits, None before the last stage.

    Parameters
    ----------
    **inputs : of the model
    """
    try:
        logits: Tensor = model(**inputs, return_dict=True).logits
    except ForwardComplete:
        return None
    return logits


def probe_stage(model: PreTrainedModel, stage: Stage) -> tuple[LayerAttention, ...]:
    """Return how each layer of the whole model attends, as `probe_model` does. All ranks call this together.

    Raises
    ------
    ValueError
        On every rank, for a model that cannot be served in stages.
    """
    with shared_outcome(stage.pipeline.group), stage.probed():
        try:
            mine = probe_model(model)
        except ValueError as error:
            advice = "" if LOAD_AGAIN in str(error) else f" Perhaps it cannot be cut into stages: {LOAD_AGAIN}"
            raise ValueError(f"as {stage.description}: {error}{advice}") from error
    return stage.all_layers(mine)


def stage_layers(model: PreTrainedModel, num_stages: int) -> list[range]:
    """Return the decoder layers of each stage, by DeepSpeed's rule: stages of as equal numbers of weights as may be."""
    from deepspeed.runtime.utils import partition_balanced

    sizes = [sum(parameter.numel() for parameter in layer.parameters()) for layer in decoder_layers(model)]
    bounds = partition_balanced(weights=sizes, num_parts=num_stages)
    return [range(first, stop) for first, stop in pairwise(bounds)]


def check_stage_of(model: PreTrainedModel, num_stages: int, group: SequenceGroup) -> None:
    """Raise ValueError if a model cannot be cut into so many stages over these ranks, or was cut otherwise."""
    stage = stage_of(model)
    if stage is None:
        if num_stages > 1:
            check_stageable(model, num_stages)
    elif stage.pipeline.num_stages != num_stages or stage.pipeline.group != group:
        raise ValueError(
            f"the model is one of {stage.pipeline.num_stages} stages of {stage.pipeline.group.world_size} ranks "
            "already; use the same stages and ranks, or load it again."
        )


def check_stageable(model: PreTrainedModel, num_stages: int) -> None:
    """Raise ValueError if a model cannot be cut into so many stages."""
    name = type(model).__name__
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise ValueError(f"DeepSpeed ZeRO-3 partitions the weights of {name}; use stages=1, or load the model without.")
    num_layers = len(decoder_layers(model))
    if num_stages > num_layers:
        raise ValueError(f"stages={num_stages} is more than the {num_layers} decoder layers of {name}.")
    if any(not layers for layers in stage_layers(model, num_stages)):
        raise ValueError(f"{name} cannot be cut into {num_stages} stages with a layer each; use fewer stages.")
    if text_decoder(model).get_input_embeddings() is not model.get_input_embeddings():
        raise ValueError(f"{name} embeds its text in another way than its decoder says; use stages=1.")
    for what, module in (("embeddings", model.get_input_embeddings()), ("head", model.get_output_embeddings())):
        if not isinstance(module, (nn.Embedding, nn.Linear)):
            raise ValueError(f"the {what} of {name} are a {type(module).__name__}; stages=1 serves them.")
