"""What keys and values in a saved context depend on: the model, its weights, and the settings of the prefill."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from apb_ds.attention import APBAttention
from apb_ds.parallel.consistency import checksum, describe_model
from apb_ds.plan import Plan
from apb_ds.utils.sizes import LayerAttention

SHOWN_DIFFERENCES = 3
SHOWN_CHARACTERS = 80
# Fields of a model's config that do not change what it computes, or that its other facts cover.
OTHER_FIELDS = frozenset({
    "architectures", "auto_map", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "use_cache",
    "id2label", "label2id", "problem_type", "output_attentions", "output_hidden_states", "return_dict",
    "chunk_size_feed_forward", "pruned_heads", "torchscript", "use_bfloat16", "attention_dropout", "initializer_range",
})  # fmt: skip


def model_facts(
    model: nn.Module, elsewhere: Mapping[str, Callable[[], Tensor] | None] = MappingProxyType({})
) -> dict[str, str]:
    """Return what must be the same for keys and values to be a model's: class, config, weights, rotary frequencies.

    Parameters
    ----------
    elsewhere : as of `describe_model`
    """
    described = describe_model(model, elsewhere)
    facts = {name: text for name, text in described.items() if name in ("class", "dtype")}
    facts |= {
        name: text
        for name, text in described.items()
        if name.startswith("config.") and name.removeprefix("config.") not in OTHER_FIELDS
    }
    facts["weights"] = _digest(f"{name}: {text}" for name, text in described.items() if name.startswith("weights "))
    stored = model.state_dict().keys()
    frequencies = [
        f"{name}: {checksum(buffer).tolist()}"
        for name, buffer in model.named_buffers()
        if name not in stored and "inv_freq" in name
    ]
    facts["rotary frequencies"] = _digest(frequencies)
    return facts


def content_facts(attention: APBAttention, plan: Plan) -> dict[str, Any]:
    """Return the settings that change what a document's cache contains; how it is computed does not."""
    if plan.exact:
        return {"exact": True}
    facts: dict[str, Any] = {
        "exact": False,
        "hosts": plan.hosts,
        "anchor_length": plan.anchor_length,
        "anchor's query tokens": plan.anchor_query_length,
        "passing_length": plan.passing_length,
    }
    if plan.anchor_query_length:
        facts["query_position"] = plan.query_position
    settings: Any = attention.config.settings
    if plan.passing_length:
        facts["compressor"] = settings.compressor
        heads = getattr(attention.compressor, "heads", None)
        if isinstance(heads, nn.Module):
            facts["retaining heads"] = _digest(f"{name}: {text}" for name, text in describe_model(heads).items())
        if settings.compressor == "random":
            facts["seed"] = settings.seed
    return facts


def _digest(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def describe_layers(layers: Sequence[LayerAttention]) -> list[dict[str, Any] | None]:
    return [
        {"window": layer.window, "shapes": [list(shape) for shape in layer.stored_shapes]} if layer.stores else None
        for layer in layers
    ]


def check_whole(stage: object) -> None:
    """Raise ValueError if a rank has a stage of the model alone, whose contexts are not saved."""
    if stage is not None:
        raise ValueError("contexts of a pipeline's stages cannot be saved or loaded; use stages=1.")


def check_same(what: str, saved: Mapping[str, Any], here: Mapping[str, Any]) -> None:
    """Raise ValueError, naming what differs. Other versions of transformers have other config fields."""
    names = [name for name in {**saved, **here} if not name.startswith("config.") or (name in saved and name in here)]
    differing = [name for name in names if saved.get(name) != here.get(name)]
    if differing:
        shown = [
            f"{name} is {_shown(saved.get(name))} in the saved context and {_shown(here.get(name))} here"
            for name in differing[:SHOWN_DIFFERENCES]
        ]
        more = f"; and {len(differing) - SHOWN_DIFFERENCES} more" if len(differing) > SHOWN_DIFFERENCES else ""
        raise ValueError(f"the context was saved with another {what}: {'; '.join(shown)}{more}.")


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."
