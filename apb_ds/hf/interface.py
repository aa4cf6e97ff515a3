"""Run APB inside transformers models, through their attention interface and without a lasting change.

Nothing is patched outside of `apb_attention`, a context manager that restores everything when it ends. Model code is
never copied. Transformers makes no mask for an implementation that its mask interface does not know, so it does not
look at positions either, for which it would wait for the device.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from apb_ds.attention import APBAttention, Phase
from apb_ds.cache import ShardedCache
from apb_ds.hf.architecture import attention_modules, attention_sizes, text_decoder
from apb_ds.hf.overrides import attention_implementation
from apb_ds.hf.rotary import fixed_rotary_frequencies, rotary_frequencies_by_reach
from apb_ds.methods.packed import Pack
from apb_ds.methods.state import PrefillState

IMPLEMENTATION = "apb"

# Names of the linear layers that project to queries, keys and values, in this order.
PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("qkv_proj",))

# Arguments of attention functions that make it something that APB does not serve.
CHANGES_ATTENTION = ("attention_mask", "position_bias", "head_mask")


class ForwardComplete(Exception):
    """Ends a forward whose rest is not needed: that of a prefill once all keys and values are stored, or of a stage."""


class ActiveCall:
    """What the attention function works with while `apb_attention` is in force. It changes through its methods only.

    Parameters
    ----------
    attention : APBAttention
    cache : ShardedCache
        The context's.
    phase : Phase
        The phase to begin with.
    state : PrefillState, optional
        Needed in the prefill phase.
    """

    def __init__(
        self,
        attention: APBAttention,
        cache: ShardedCache,
        phase: Phase,
        state: PrefillState | None = None,
    ) -> None:
        self.attention = attention
        self._cache = cache
        self._phase = phase
        self.state = state
        self.projections: list[Tensor] = []
        self._num_keys: Mapping[int | None, Tensor] = {}

    @property
    def phase(self) -> Phase:
        return self._phase

    def start_decoding(self) -> None:
        """End the query phase: every forward from here on is of one new token."""
        self._phase = Phase.DECODE

    @contextmanager
    def attending_to_first(self, num_keys: Mapping[int | None, Tensor]) -> Iterator[None]:
        """Have only so many of the first keys count; see `APBAttention.forward`.

        Parameters
        ----------
        num_keys : by `LayerAttention.window`, (1,) int32 each, on the device
        """
        self._num_keys = num_keys
        try:
            yield
        finally:
            self._num_keys = {}

    def keep_projection(self, layer_idx: int, output: Tensor) -> None:
        """Keep what a layer has projected until its attention is called, if tokens are scored there."""
        if _ACTIVE.get() is self and self.state is not None and self.state.needs_scores(layer_idx):
            self.projections.append(output)

    def attend(
        self,
        layer_idx: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Run one layer's attention, as `APBAttention.forward`.

        Raises
        ------
        ForwardComplete
            After the last layer of a prefill.
        """
        if self.state is not None:
            # Handed over, not shared: projections live only until the layer's scores are made.
            self.state.projections, self.projections = self.projections or None, []
        stands_in = self.state is not None and not sum(self.state.lengths)
        if stands_in:  # one token for none, on a rank that has none in this round
            query, key, value = query[:, :, :0], key[:, :, :0], value[:, :, :0]
        layer = self._cache.attention[layer_idx]
        num_keys = self._num_keys.get(layer.window)
        cached = self._cache.layer(layer_idx)
        if cached.is_expanded and num_keys is None and self._phase is not Phase.PREFILL:
            key, value = key[:, :, : cached.local_length], value[:, :, : cached.local_length]
        output: Tensor = self.attention(
            query,
            key,
            value,
            phase=self._phase,
            layer_idx=layer_idx,
            state=self.state,
            scale=scale,
            window=layer.window,
            softcap=layer.softcap,
            sinks=sinks,
            num_keys=num_keys,
            holds_new=self._cache.holds_new,
        )
        if self._phase is Phase.PREFILL and self.state is not None and self.state.is_last_layer(layer_idx):
            raise ForwardComplete
        return output.new_zeros((*output.shape[:2], 1, output.shape[-1])) if stands_in else output


class PackedCall:
    """What the attention function works with in the forward of a pack.

    Parameters
    ----------
    attention : APBAttention
    pack : Pack
        The forward's tokens.
    """

    def __init__(self, attention: APBAttention, pack: Pack) -> None:
        self._attention = attention
        self._pack = pack

    def attend(
        self,
        layer_idx: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """Run one layer's attention, as `APBAttention.forward`."""
        layer = self._pack.layers[layer_idx]
        output: Tensor = self._attention(
            query,
            key,
            value,
            phase=Phase.PACKED,
            layer_idx=layer_idx,
            scale=scale,
            window=layer.window,
            softcap=layer.softcap,
            sinks=sinks,
            pack=self._pack,
        )
        return output


class PassingCache(Cache):
    """A cache that stores nothing: it hands on what a layer gives it, and returns it as it is.

    A layer attends to what its cache returns, or to what it makes of that.

    Parameters
    ----------
    receive : called as ``receive(layer_idx, keys, values)``, (1, kv_heads, tokens, channels) each; what it returns is
        returned instead, if that is not None
    """

    def __init__(self, receive: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor] | None]) -> None:
        super().__init__(layers=[])
        self._receive = receive

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        return self._receive(layer_idx, key_states, value_states) or (key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


_ACTIVE: ContextVar[ActiveCall | PackedCall | None] = ContextVar("apb_ds_active_call", default=None)
_registrations = 0
_numbers = itertools.count()  # of the functions of `own_attention`
_registration_lock = threading.Lock()


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The function behind ``attn_implementation="apb"``: pass transformers' tensors to `APBAttention`.

    Returns
    -------
    (1, tokens, heads, value_dim), and no attention weights
    """
    call = _ACTIVE.get()
    if call is None:
        raise RuntimeError("attn_implementation='apb' works only inside an APBEngine; use apb_ds.init_inference.")
    kwargs["attention_mask"] = attention_mask
    for name in CHANGES_ATTENTION:
        if kwargs.get(name) is not None:
            raise ValueError(f"{type(module).__name__} passes {name} to its attention, which APB does not support.")
    layer_idx = int(module.layer_idx)  # type: ignore[arg-type]
    output = call.attend(layer_idx, query, key, value, scale=scaling, sinks=kwargs.get("s_aux"))
    # Contiguous as transformers' own functions return it: some models look at it through a view.
    return output.transpose(1, 2).contiguous(), None


@contextmanager
def _registered() -> Iterator[None]:
    """Register the implementation with transformers for as long as a call uses it."""
    global _registrations
    with _registration_lock:
        _registrations += 1
        AttentionInterface.register(IMPLEMENTATION, attention_forward)
    try:
        yield
    finally:
        with _registration_lock:
            _registrations -= 1
            if _registrations == 0:
                AttentionInterface._global_mapping.pop(IMPLEMENTATION, None)


@contextmanager
def apb_attention(
    model: PreTrainedModel,
    attention: APBAttention,
    cache: ShardedCache,
    phase: Phase,
    max_positions: int,
    state: PrefillState | None = None,
) -> Iterator[ActiveCall]:
    """Run the model's attention through `attention`; restore the model on leaving.

    Parameters
    ----------
    cache : ShardedCache
        The context's.
    phase : Phase
        The phase to begin with; the yielded call's `start_decoding` changes it.
    max_positions : int
        Positions 0..max_positions-1 are what this request can use: rotary frequencies are those for the largest.
    state : PrefillState
        Needed in the prefill phase.
    """
    call = ActiveCall(attention, cache, phase, state)
    with ExitStack() as stack:
        stack.enter_context(_registered())
        stack.enter_context(_implementation(model, IMPLEMENTATION))
        stack.enter_context(fixed_rotary_frequencies(model, max_positions))
        if state is not None and attention.needs_projections:
            stack.enter_context(captured_projections(model, call.keep_projection))
        token = _ACTIVE.set(call)
        stack.callback(_ACTIVE.reset, token)
        yield call


@contextmanager
def packed_attention(
    model: PreTrainedModel, attention: APBAttention, pack: Pack, reaches: Sequence[tuple[int, int]]
) -> Iterator[None]:
    """Run the model's attention for a pack; restore the model on leaving. May be entered within `apb_attention`.

    Parameters
    ----------
    reaches : numbers of tokens that follow each other in the pack, and the positions that their rotary frequencies are
        chosen for
    """
    with ExitStack() as stack:
        stack.enter_context(_registered())
        stack.enter_context(_implementation(model, IMPLEMENTATION))
        stack.enter_context(rotary_frequencies_by_reach(model, reaches))
        token = _ACTIVE.set(PackedCall(attention, pack))
        stack.callback(_ACTIVE.reset, token)
        yield


@contextmanager
def own_attention(model: PreTrainedModel, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Have the model call an attention function, without a mask; restore the model on leaving.

    Parameters
    ----------
    name : what the name that it is registered by begins with; several threads may use the same
    function : with the signature of transformers' attention functions
    """
    name = f"{name}_{next(_numbers)}"
    AttentionInterface.register(name, function)
    try:
        with _implementation(model, name):
            yield
    finally:
        AttentionInterface._global_mapping.pop(name, None)


def _implementation(model: PreTrainedModel, name: str) -> AbstractContextManager[None]:
    configs = [getattr(module, "config", None) for module in text_decoder(model).modules()]
    return attention_implementation([config for config in configs if isinstance(config, PretrainedConfig)], name)


@contextmanager
def captured_projections(model: PreTrainedModel, keep: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Hand over each layer's projections, before anything else is done to them; remove all hooks on leaving.

    Parameters
    ----------
    keep : called as ``keep(layer_idx, output)`` with each projection, (1, tokens, channels), to queries, keys and
        values in this order (once if they are fused), before the layer's attention
    """

    def hook(layer_idx: int) -> Any:
        return lambda module, args, output: keep(layer_idx, output)

    with ExitStack() as stack:
        for layer_idx, module in attention_modules(model).items():
            for projection in projection_modules(module):
                stack.callback(projection.register_forward_hook(hook(layer_idx)).remove)
        yield


def projection_modules(module: nn.Module) -> list[nn.Module]:
    """Return an attention module's projections to queries, keys and values; empty if their names are unknown."""
    for names in PROJECTIONS:
        if all(isinstance(getattr(module, name, None), nn.Module) for name in names):
            return [getattr(module, name) for name in names]
    return []


def check_projections(model: PreTrainedModel) -> None:
    """Refuse a model whose queries, keys and values cannot be taken before rotation.

    Raises
    ------
    ValueError
        If an attention module lacks these projections, or they project to something else as well.
    """
    sizes = attention_sizes(model)
    channels = (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim
    for layer_idx, module in sorted(attention_modules(model).items()):
        widths = [getattr(projection, "out_features", None) for projection in projection_modules(module)]
        if not widths or None in widths or sum(width or 0 for width in widths) != channels:
            raise ValueError(
                f"compressor='retaining_heads' takes queries, keys and values from q_proj, k_proj and v_proj, or from "
                f"qkv_proj, with {channels} channels together; layer {layer_idx} ({type(module).__name__}) of "
                f"{type(model).__name__} has no such projections. Use another compressor."
            )
