"""Transformers models run APB: attention and mask interfaces and fixed rotary frequencies, all of it reversible.

Nothing is patched outside of `apb_attention`, a context manager that puts everything back when it ends. Model code is
never copied.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from apb_ds.attention import APBAttention, Phase
from apb_ds.methods.state import PrefillState

IMPLEMENTATION = "apb"

# Rotary embeddings that pick their frequencies from the largest position of each forward.
POSITION_DEPENDENT_ROPE = ("dynamic", "longrope")

# What the linear layers are called that give an attention module its queries, keys and values, in this order.
PROJECTIONS = (("q_proj", "k_proj", "v_proj"), ("qkv_proj",))

# Arguments of attention functions that change what attention is; plain softmax attention has none of them.
CHANGES_ATTENTION = ("softcap", "s_aux", "position_bias", "head_mask")


class PrefillComplete(Exception):
    """Ends a prefill forward after the last layer's keys and values are stored: nothing behind them is needed."""


@dataclass
class ActiveCall:
    """What the attention function works with while `apb_attention` is in force."""

    attention: APBAttention
    phase: Phase
    state: PrefillState | None
    projections: list[Tensor] = field(default_factory=list)

    def keep_projection(self, layer_idx: int, output: Tensor) -> None:
        """Keep what a layer has projected until its attention is called, if tokens are scored there."""
        if self.state is not None and self.state.needs_scores(layer_idx):
            self.projections.append(output)


_ACTIVE: ContextVar[ActiveCall | None] = ContextVar("apb_ds_active_call", default=None)
_registrations = 0
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
    """The function behind ``attn_implementation="apb"``: hands transformers' tensors to `APBAttention`.

    Returns
    -------
    (1, tokens, heads, head_dim), and no attention weights
    """
    call = _ACTIVE.get()
    if call is None:
        raise RuntimeError("attn_implementation='apb' works inside an APBEngine only; use apb_ds.init_inference.")
    for name in CHANGES_ATTENTION:
        if kwargs.get(name) is not None:
            raise ValueError(f"{type(module).__name__} passes {name} to its attention, which APB does not have.")
    layer_idx = int(module.layer_idx)  # type: ignore[arg-type]
    if call.state is not None:
        # Handed over, not shared: what is captured lives until the layer's scores are made.
        call.state.projections = call.projections or None
        call.projections = []
    output = call.attention(query, key, value, phase=call.phase, layer_idx=layer_idx, state=call.state, scale=scaling)
    if call.phase is Phase.PREFILL and call.state is not None and call.state.is_last_layer(layer_idx):
        raise PrefillComplete
    return output.transpose(1, 2), None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


@contextmanager
def _registered() -> Iterator[None]:
    """Have transformers know the implementation by name, for as long as anybody uses it."""
    global _registrations
    with _registration_lock:
        _registrations += 1
        AttentionInterface.register(IMPLEMENTATION, attention_forward)
        AttentionMaskInterface.register(IMPLEMENTATION, _no_mask)
    try:
        yield
    finally:
        with _registration_lock:
            _registrations -= 1
            if _registrations == 0:
                AttentionInterface._global_mapping.pop(IMPLEMENTATION, None)
                AttentionMaskInterface._global_mapping.pop(IMPLEMENTATION, None)


@contextmanager
def apb_attention(
    model: PreTrainedModel,
    attention: APBAttention,
    phase: Phase,
    max_positions: int,
    state: PrefillState | None = None,
) -> Iterator[ActiveCall]:
    """Run the model's attention through `attention`; on leaving, the model is as it was.

    Parameters
    ----------
    phase : Phase
        The phase to begin with; assign to ``.phase`` of the yielded call to change it.
    max_positions : int
        Positions 0..max_positions-1 are what this request can use: rotary frequencies are those for the largest.
    state : PrefillState
        Needed in the prefill phase.
    """
    call = ActiveCall(attention, phase, state)
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
def own_attention(model: PreTrainedModel, name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Have the model call an attention function, without a mask; on leaving, everything is as it was.

    Parameters
    ----------
    name : under which transformers knows it meanwhile; of no other function
    function : as transformers' attention functions
    """
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, _no_mask)
    try:
        with _implementation(model, name):
            yield
    finally:
        AttentionInterface._global_mapping.pop(name, None)
        AttentionMaskInterface._global_mapping.pop(name, None)


@contextmanager
def _implementation(model: PreTrainedModel, name: str) -> Iterator[None]:
    all_configs: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in all_configs if hasattr(config, "_attn_implementation_internal")}
    before = [(config, config._attn_implementation_internal) for config in configs.values()]
    try:
        for config, _ in before:
            config._attn_implementation_internal = name
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation


@contextmanager
def captured_projections(model: PreTrainedModel, keep: Callable[[int, Tensor], None]) -> Iterator[None]:
    """Hand over what each layer projects, before anything else is done to it; on leaving, no hook is left.

    Parameters
    ----------
    keep : called as ``keep(layer_idx, output)`` after each of the layer's projections to queries, keys and values, in
        this order (once where they are one), with (1, tokens, channels), before the layer's attention
    """

    def hook(layer_idx: int) -> Any:
        return lambda module, args, output: keep(layer_idx, output)

    with ExitStack() as stack:
        for layer_idx, module in attention_modules(model).items():
            for projection in projection_modules(module):
                stack.callback(projection.register_forward_hook(hook(layer_idx)).remove)
        yield


def projection_modules(module: nn.Module) -> list[nn.Module]:
    """Return the linear layers that give an attention module its queries, keys and values; empty if not known."""
    for names in PROJECTIONS:
        if all(isinstance(getattr(module, name, None), nn.Module) for name in names):
            return [getattr(module, name) for name in names]
    return []


def check_projections(model: PreTrainedModel) -> None:
    """Refuse a model whose queries, keys and values cannot be taken before rotation.

    Raises
    ------
    ValueError
        If an attention module has no projections that are known, or they give something else as well.
    """
    sizes = geometry_of(model)
    channels = (sizes.heads + 2 * sizes.kv_heads) * sizes.head_dim
    for layer_idx, module in sorted(attention_modules(model).items()):
        widths = [getattr(projection, "out_features", None) for projection in projection_modules(module)]
        if not widths or None in widths or sum(width or 0 for width in widths) != channels:
            raise ValueError(
                f"compressor='retaining_heads' takes queries, keys and values from q_proj, k_proj and v_proj, or from "
                f"qkv_proj, with {channels} channels together; layer {layer_idx} ({type(module).__name__}) of "
                f"{type(model).__name__} has no such projections. Use another compressor."
            )


@contextmanager
def fixed_rotary_frequencies(model: PreTrainedModel, max_positions: int) -> Iterator[None]:
    """Make rotary modules choose their frequencies for position ``max_positions - 1``, whatever a forward holds.

    Only for scalings that depend on the positions of a forward; on leaving, the modules are as they were.
    """
    rotary = [module for module in model.modules() if is_position_dependent_rope(module)]
    with ExitStack() as stack:
        for module in rotary:
            stack.callback(_restore_rotary, module, _rotary_state(module))
            _reset_rotary(module)
            stack.callback(module.register_forward_pre_hook(_appender(max_positions - 1), with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(_drop_last_position).remove)
        yield


def is_position_dependent_rope(module: nn.Module) -> bool:
    """Whether the module is a rotary embedding whose frequencies depend on the positions of a forward."""
    return hasattr(module, "inv_freq") and getattr(module, "rope_type", None) in POSITION_DEPENDENT_ROPE


def _rotary_state(module: Any) -> tuple[Tensor, dict[str, Any]]:
    kept = {
        name: getattr(module, name) for name in ("max_seq_len_cached", "attention_scaling") if hasattr(module, name)
    }
    return module.inv_freq.clone(), kept


def _restore_rotary(module: Any, before: tuple[Tensor, dict[str, Any]]) -> None:
    inv_freq, kept = before
    module.inv_freq = inv_freq
    for name, value in kept.items():
        setattr(module, name, value)


def _reset_rotary(module: Any) -> None:
    """Forget a growth that an earlier, longer forward left behind."""
    if hasattr(module, "original_inv_freq") and hasattr(module, "original_max_seq_len"):
        module.inv_freq = module.original_inv_freq.clone()
        module.max_seq_len_cached = module.original_max_seq_len


def _appender(position: int) -> Any:
    def append(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        hidden, *rest = args
        position_ids = kwargs.pop("position_ids", None)
        if position_ids is None:
            position_ids, *rest = rest
        extended = torch.cat([position_ids, position_ids.new_full((*position_ids.shape[:-1], 1), position)], dim=-1)
        return (hidden, extended, *rest), kwargs

    return append


def _drop_last_position(module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    cos, sin = output
    return cos[..., :-1, :], sin[..., :-1, :]


@dataclass(frozen=True)
class Geometry:
    """Sizes of a decoder's attention."""

    num_layers: int
    heads: int
    kv_heads: int
    head_dim: int


def geometry_of(model: PreTrainedModel) -> Geometry:
    """Read the attention's sizes from the model's config."""
    config = model.config
    heads = config.num_attention_heads
    return Geometry(
        num_layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


def attention_modules(model: PreTrainedModel) -> dict[int, nn.Module]:
    """Return the model's attention modules by layer index."""
    modules = (module for module in model.modules() if hasattr(module, "is_causal") and hasattr(module, "layer_idx"))
    return {int(module.layer_idx): module for module in modules}  # type: ignore[arg-type]


def check_supported(model: PreTrainedModel) -> None:
    """Refuse, by name, what APB cannot serve.

    Raises
    ------
    ValueError
        If the model is no causal decoder over transformers' attention interface, or a layer of it is no plain softmax
        attention.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise ValueError(f"model={name} must be a transformers PreTrainedModel.")
    config = model.config
    if config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder; APB serves decoders.")
    if not getattr(model, "_supports_attention_backend", False):
        raise ValueError(f"{name} does not route its attention through transformers' AttentionInterface.")
    if config.get_text_config() is not config:
        raise ValueError(f"{name} is made of several models; APB serves plain decoders. Use its language model.")
    if getattr(config, "num_kv_shared_layers", None):
        raise ValueError(f"{name} shares keys and values between layers; APB serves layers with their own.")
    modules = attention_modules(model)
    for layer_idx in range(config.num_hidden_layers):
        _check_layer(name, config, layer_idx, modules.get(layer_idx))


def _check_layer(name: str, config: Any, layer_idx: int, module: nn.Module | None) -> None:
    layer_types = getattr(config, "layer_types", None)
    layer_type = layer_types[layer_idx] if layer_types else "full_attention"
    where = f"{name}, layer {layer_idx}"
    if module is None or layer_type not in ("full_attention", "sliding_attention"):
        raise ValueError(f"{where} ({layer_type}) is no softmax attention; APB cannot serve it.")
    kind = type(module).__name__
    if getattr(config, "attn_logit_softcapping", None) is not None or hasattr(module, "sinks"):
        raise ValueError(
            f"{where} ({kind}) caps its logits or has attention sinks; APB serves plain softmax attention."
        )
    if getattr(config, "kv_lora_rank", None) is not None:
        raise ValueError(f"{where} ({kind}) is latent attention; APB serves attention with keys and values per head.")


def check_positions(model: PreTrainedModel, num_positions: int) -> None:
    """Refuse a request that needs more positions than a layer's window or the model has.

    Parameters
    ----------
    num_positions : document, query and new tokens together
    """
    config: Any = model.config
    layer_types = getattr(config, "layer_types", None)
    window: int | None = getattr(config, "sliding_window", None)
    for layer_idx, module in sorted(attention_modules(model).items()):
        slides = layer_types is None or layer_types[layer_idx] == "sliding_attention"
        if slides and window is not None and window < num_positions:
            raise ValueError(
                f"layer {layer_idx} ({type(module).__name__}) attends within a window of sliding_window={window} "
                f"tokens, shorter than the {num_positions} positions of this request; APB serves full attention."
            )
    limit = getattr(config, "max_position_embeddings", None)
    scales_on_its_own = any(getattr(module, "rope_type", None) == "dynamic" for module in model.modules())
    if limit is not None and num_positions > limit and not scales_on_its_own:
        raise ValueError(
            f"the document, query and new tokens need {num_positions} positions; the model has "
            f"max_position_embeddings={limit}. Shorten them, or extend the model by rope scaling: set its config's "
            "rope_parameters to a scaled rotary embedding (yarn, dynamic, longrope) and max_position_embeddings to "
            "what that reaches (on the command line: +model.overrides.rope_parameters={...} and "
            f"+model.overrides.max_position_embeddings={num_positions})."
        )


def check_reach(model: PreTrainedModel, max_positions: int, num_positions: int) -> None:
    """Refuse a turn that needs other rotary frequencies than its context was prefilled with.

    Parameters
    ----------
    max_positions : positions that the context's frequencies were chosen for
    num_positions : positions that the turn needs, the document's included
    """
    check_positions(model, num_positions)
    rotary = [module for module in model.modules() if is_position_dependent_rope(module)]
    rotary = [module for module in rotary if _frequencies_differ(module, max_positions, num_positions)]
    if num_positions > max_positions and rotary:
        raise ValueError(
            f"this turn needs {num_positions} positions; the context was prefilled for {max_positions}, and the "
            f"model's rotary frequencies ({rotary[0].rope_type}) depend on that. "
            f"Use prefill(..., max_positions={num_positions}) or more."
        )


def _frequencies_differ(module: Any, max_positions: int, num_positions: int) -> bool:
    """Whether a rotary module chooses other frequencies for `num_positions` than for `max_positions`."""
    if module.rope_type == "longrope":
        switch = module.config.rope_parameters["original_max_position_embeddings"]
        return (max_positions > switch) != (num_positions > switch)
    return max(max_positions, num_positions) > module.original_max_seq_len
