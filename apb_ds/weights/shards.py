"""Cutting a model's weights over the ranks of a group."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from apb_ds.config import check_integer
from apb_ds.hf.architecture import attention_modules, decoder_layers, replace_module
from apb_ds.hf.overrides import forward_override, overridden
from apb_ds.parallel.groups import SequenceGroup
from apb_ds.weights.cut import check_shardable, rows_of
from apb_ds.weights.gatherer import Gatherer
from apb_ds.weights.layers import JointLinears, ShardedLinear

_of_models: weakref.WeakKeyDictionary[nn.Module, ShardedWeights] = weakref.WeakKeyDictionary()

# Linear layers of one module that read the same input, in the order in which models call them.
JOINT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class ShardedWeights:
    """A model whose linear layers are cut over the ranks, by output channels; made in place.

    Embeddings, norms, biases and what lies outside of decoder layers and head stay whole on every rank.

    Parameters
    ----------
    model : transformers decoder, with all weights on every rank or cut already, and without gradients afterwards
    group : the ranks that hold one copy of the weights together, a part each

    Attributes
    ----------
    gatherer : brings layers together during a prefill
    facts : what describes the whole model, for saved contexts
    """

    def __init__(self, model: PreTrainedModel, group: SequenceGroup) -> None:
        check_shardable(model)
        self.facts: dict[str, str] = {}
        self._model: Any = weakref.ref(model)
        self._layers = dict(zip(sorted(attention_modules(model)), decoder_layers(model), strict=True))
        layers = {layer_idx: _cut(layer, group) for layer_idx, layer in self._layers.items()}
        head = model.get_output_embeddings()
        if type(head) is nn.Linear:
            embedding = model.get_input_embeddings()
            is_tied = head.weight is getattr(embedding, "weight", None)
            replace_module(model, head, ShardedLinear(head, group, is_view=is_tied))
        self.gatherer = Gatherer(layers, group.apart())
        _of_models[model] = self

    @classmethod
    def of(cls, model: PreTrainedModel, group: SequenceGroup) -> ShardedWeights:
        """Return a model's sharded weights, sharded now unless they are. The group's ranks call this together."""
        return _of_models.get(model) or cls(model, group)

    def whole_weights(self) -> dict[str, Callable[[], Tensor] | None]:
        """Return, by name, what gathers each weight; None for one that is a view of another."""
        modules = self._model().named_modules()
        linears = ((name, module) for name, module in modules if isinstance(module, ShardedLinear))
        return {f"{name}.weight": None if linear.is_view else linear.gather for name, linear in linears}

    @property
    def num_gathered_bytes(self) -> int:
        """Bytes of weights that this rank has sent to others so far in prefills."""
        return self.gatherer.group.bytes_sent

    @contextmanager
    def in_prefill(self, layers: Sequence[int], num_rounds: int) -> Iterator[None]:
        """Have layers compute with whole weights in this context, in order, round by round.

        Parameters
        ----------
        layers : that a round computes on this rank, in order
        """
        overrides = [forward_override(self._layers[layer_idx], self._entering(layer_idx)) for layer_idx in layers]
        with self.gatherer.gathering([*layers] * num_rounds), overridden(overrides):
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


def is_sharded(model: nn.Module) -> bool:
    """Whether this rank holds parts of the model's weights already."""
    return model in _of_models or any(
        type(module) is nn.Linear and module.weight.dim() == 2 and len(module.weight) != module.out_features
        for module in model.modules()
    )


def check_weights_for(model: PreTrainedModel, shard_weights: bool, shard_ranks: int) -> None:
    """Raise ValueError if the model's weights cannot be used, or sharded, as asked for.

    Parameters
    ----------
    shard_ranks : how many ranks hold one copy of the weights together
    """
    if not is_sharded(model):
        if shard_weights:
            check_shardable(model)
        return
    if not shard_weights:
        raise ValueError("the model's weights are sharded over the ranks; use shard_weights=True.")
    for module in model.modules():
        if isinstance(module, ShardedLinear):
            rows = module.rows
        elif type(module) is nn.Linear and len(module.weight) != module.out_features:
            rows = len(module.weight)
        else:
            continue
        if rows != rows_of(module.out_features, shard_ranks):
            raise ValueError(
                f"the model's weights are in parts already, of {rows} rows where shard_ranks={shard_ranks} makes "
                f"{rows_of(module.out_features, shard_ranks)}; use the same shard_ranks in load_model and "
                "init_inference, or load the model again."
            )


def check_shard_ranks(shard_ranks: int | None, shard_weights: bool | str, world_size: int) -> None:
    """Raise ValueError unless so many ranks can hold one copy of the weights together; None stands for all ranks.

    Parameters
    ----------
    world_size : of all ranks
    """
    if shard_ranks is None:
        return
    check_integer("shard_ranks", shard_ranks, 1)
    if not shard_weights:
        raise ValueError(f"shard_ranks={shard_ranks} needs shard_weights=true; set that, or leave shard_ranks out.")
    if world_size % shard_ranks:
        raise ValueError(f"shard_ranks={shard_ranks} must be a divisor of the number of ranks ({world_size}).")


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
