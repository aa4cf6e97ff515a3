"""Cutting a model's weights over the ranks of a group."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from apb_ds.hf.architecture import decoder_layers
from apb_ds.hf.overrides import forward_override, overridden
from apb_ds.parallel.groups import SequenceGroup
from apb_ds.weights.gatherer import Gatherer
from apb_ds.weights.layers import JointLinears, ShardedLinear

# Linear layers of one module that read the same input, in the order in which models call them.
JOINT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class ShardedWeights:
    """A model whose linear layers are cut over the ranks, by output channels; made in place.

    Embeddings, norms, biases and what lies outside of decoder layers and head stay whole on every rank.

    Parameters
    ----------
    model : transformers decoder, with all weights on every rank, and without gradients afterwards
    group : the ranks, which hold a part each
    facts : what describes the whole model, for saved contexts

    Attributes
    ----------
    gatherer : brings layers together during a prefill
    """

    def __init__(self, model: PreTrainedModel, group: SequenceGroup, facts: dict[str, str]) -> None:
        check_shardable(model)
        self.facts = facts
        layers = [_cut(layer, group) for layer in decoder_layers(model)]
        head = model.get_output_embeddings()
        if type(head) is nn.Linear:
            embedding = model.get_input_embeddings()
            is_tied = head.weight is getattr(embedding, "weight", None)
            _put(model, head, ShardedLinear(head, group, is_view=is_tied))
        self._layers = decoder_layers(model)
        self.gatherer = Gatherer(layers, group.apart())

    @property
    def num_gathered_bytes(self) -> int:
        """Bytes of weights that this rank has sent to others so far in prefills."""
        return self.gatherer._group.bytes_sent

    @contextmanager
    def in_prefill(self, num_layers: int, num_rounds: int) -> Iterator[None]:
        """Have layers compute with whole weights in this context, in order, round by round.

        Parameters
        ----------
        num_layers : that a round computes, the first ones
        """
        overrides = [
            forward_override(layer, self._entering(layer_idx))
            for layer_idx, layer in enumerate(self._layers[:num_layers])
        ]
        with self.gatherer.gathering([*range(num_layers)] * num_rounds), overridden(overrides):
            yield

    def in_place(self) -> AbstractContextManager[None]:
        """Have all layers compute in place in this context, also inside a prefill."""
        return self.gatherer.set_aside()

    def _entering(self, layer_idx: int) -> Any:
        def make(forward: Any) -> Any:
            def run(*args: Any, **kwargs: Any) -> Any:
                self.gatherer.enter(layer_idx)
                return forward(*args, **kwargs)

            return run

        return make


def check_whole(model: nn.Module) -> None:
    """Raise ValueError if the model's weights are sharded already."""
    if any(isinstance(module, ShardedLinear) for module in model.modules()):
        raise ValueError("the model's weights are sharded, for the engine that was made with it; use that engine.")


def check_shardable(model: PreTrainedModel) -> None:
    """Raise ValueError, naming the first, if decoder layers hold large weights of other layers than ``nn.Linear``."""
    for layer in decoder_layers(model):
        for name, module in layer.named_modules():
            for kind, parameter in module.named_parameters(recurse=False):
                if parameter.dim() > 1 and type(module) is not nn.Linear:
                    raise ValueError(
                        f"weights of {type(model).__name__} cannot be sharded: {type(module).__name__} "
                        f"({name}.{kind}) in a decoder layer is not a plain linear layer. Use shard_weights=false."
                    )


def _cut(layer: nn.Module, group: SequenceGroup) -> list[ShardedLinear]:
    """Replace a decoder layer's linear layers; return the new ones, in order."""
    found: list[ShardedLinear] = []
    for module in list(layer.modules()):
        cut = {name: child for name, child in module.named_children() if type(child) is nn.Linear}
        for name, child in cut.items():
            setattr(module, name, ShardedLinear(child, group))
            found.append(getattr(module, name))
        for names in JOINT:
            if all(name in cut for name in names):
                _join([getattr(module, name) for name in names], group)
    return found


def _join(linears: Sequence[ShardedLinear], group: SequenceGroup) -> None:
    joint = JointLinears(linears, group)
    for linear in linears:
        linear.join(joint)


def _put(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Replace a module wherever it is in a model."""
    for module in model.modules():
        for name, child in list(module.named_children()):
            if child is old:
                setattr(module, name, new)
