"""The base of all compressors: a subclass scores the tokens of a block; choosing and gathering happen here."""

from __future__ import annotations

import functools
import importlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from apb_ds.config import COMPRESSORS, BlockSettings, check_choice
from apb_ds.ops import profiling
from apb_ds.ops.compiled import compiled_if
from apb_ds.ops.selection import copy_pair, gather_pair, select_top

# Logits that `mean_attention` computes at a time: 256 MiB, and twice that in use. A product still has 512 rows over a
# block of 131,072 tokens, enough to keep a device busy, and short blocks are not split.
MAX_LOGITS = 2**26


@dataclass(frozen=True)
class BlockStates:
    """One block in one layer, on the rank that serves it.

    Attributes
    ----------
    queries : (1, heads, block_tokens, head_dim), rotated
    keys, values : (1, kv_heads, block_tokens, head_dim), keys rotated
    start : document position of the block's first token
    layer_idx : index of the layer
    scale : factor on the attention logits
    anchor_queries : (1, heads, query_tokens, head_dim), the anchor's query vectors, rotated for their anchor positions;
        None unless the compressor needs them
    projections : (1, block_tokens, (heads + 2 kv_heads) head_dim), the concatenated outputs of the layer's query, key
        and value projections; None unless the compressor needs them
    fused : whether elementwise operations are compiled
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    start: int
    layer_idx: int
    scale: float
    anchor_queries: Tensor | None = None
    projections: Tensor | None = None
    fused: bool = False

    @property
    def num_tokens(self) -> int:
        return self.keys.shape[2]

    @property
    def kv_heads(self) -> int:
        return self.keys.shape[1]


class Compressor:
    """Gives every token of a block one score per KV head; the tokens with the highest scores are passed on.

    A subclass implements `score` only. Statistics run over the whole block; eligibility is applied afterwards. Scores
    must not depend on the rank or the order of calls, or results would depend on the number of ranks.
    """

    name: ClassVar[str]
    needs_anchor_queries: ClassVar[bool] = False
    needs_projections: ClassVar[bool] = False
    needs_heads: ClassVar[bool] = False

    @classmethod
    def from_settings(cls, settings: BlockSettings) -> Compressor:
        """Build from a request's settings; compressors that have settings override this."""
        return cls()

    def score(self, block: BlockStates) -> Tensor:
        """Return the scores, (kv_heads, block_tokens), float32; the highest are kept."""
        raise NotImplementedError

    def score_products(self, block_tokens: int, query_tokens: int, heads: int, head_dim: int) -> int:
        """Return the number of multiply-adds in the matrix products of `score`.

        Parameters
        ----------
        query_tokens : query tokens in the anchor
        """
        return 0

    @profiling.belongs_to(profiling.COMPRESSOR)
    def choose(self, block: BlockStates, count: int, num_eligible: int) -> Tensor:
        """Return the places in the block of the `count` best of its last `num_eligible` tokens, in document order.

        Returns
        -------
        (kv_heads, count), int64
        """
        first = block.num_tokens - num_eligible
        if count == num_eligible:
            places = torch.arange(first, block.num_tokens, device=block.keys.device)
            return places.expand(block.kv_heads, count)
        # NaN never beats a number.
        scores = torch.nan_to_num(self.score(block)[:, first:], nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        if block.fused and count > 0:
            return _triton_selection().select_top(scores, count, first)
        return select_top(scores, count) + first

    def compress(self, block: BlockStates, count: int, num_eligible: int, into: Tensor) -> None:
        """Keep the `count` best of the block's last `num_eligible` tokens, in document order.

        Parameters
        ----------
        into : (2, kv_heads, count, head_dim), receives their keys, then their values; may be a view
        """
        if count == num_eligible:
            first = block.num_tokens - num_eligible
            copy_pair(block.keys[:, :, first:], block.values[:, :, first:], into)
            return
        gather(block.keys, block.values, self.choose(block, count, num_eligible), into, block.fused)


@profiling.belongs_to(profiling.COMPRESSOR)
def gather(keys: Tensor, values: Tensor, places: Tensor, into: Tensor, fused: bool) -> None:
    """Copy tokens' keys and values as `gather_pair` does, in one kernel if `fused`."""
    if fused:
        _triton_selection().gather_pair(keys, values, places, into)
    else:
        gather_pair(keys, values, places, into)


def _triton_selection() -> Any:
    return importlib.import_module("apb_ds.ops.triton_selection")  # Triton may be missing where nothing is fused


def max_pool(scores: Tensor, width: int = 5) -> Tensor:
    """Replace each score, (kv_heads, tokens), by the maximum of its neighbourhood, cut off at the edges."""
    return F.max_pool1d(scores.unsqueeze(0), width, stride=1, padding=width // 2).squeeze(0)


def mean_attention(
    queries: Tensor, keys: Tensor, scale: float, num_hidden: Tensor | None = None, fused: bool = False
) -> Tensor:
    """Return the share of the queries' attention that each key gets, averaged over the queries, grouped by KV head.

    Computed in pieces of KV heads and queries: all logits of a long query over a long block take tens of GiB.

    Parameters
    ----------
    queries : (1, heads, queries, head_dim)
    keys : (1, kv_heads, tokens, head_dim)
    num_hidden : (queries,), how many of the last keys each query does not see, or None
    fused : whether elementwise operations are compiled

    Returns
    -------
    (kv_heads, heads per KV head, tokens), float32
    """
    group, num_queries = queries.shape[1] // keys.shape[1], queries.shape[2]
    queries_at_once = max(1, MAX_LOGITS // (group * keys.shape[2]))
    heads_at_once = max(1, queries_at_once // num_queries)
    unseen = itertools.repeat(None) if num_hidden is None else num_hidden.split(queries_at_once)
    share = compiled_if(_share, fused)
    shares = []
    for of_heads, of_keys in zip(
        queries.split(group * heads_at_once, dim=1), keys.split(heads_at_once, dim=1), strict=True
    ):
        pieces = zip(of_heads.split(queries_at_once, dim=2), unseen, strict=False)
        parts = (share(_products_by_group(piece, of_keys), hidden, scale, num_queries) for piece, hidden in pieces)
        shares.append(functools.reduce(torch.add, parts))
    return torch.cat(shares) if len(shares) > 1 else shares[0]


def _products_by_group(queries: Tensor, keys: Tensor) -> Tensor:
    """Return the products of queries and keys, (kv_heads, heads per KV head, queries, tokens), float32, unscaled."""
    grouped = queries[0].unflatten(0, (keys.shape[1], -1))
    # One matrix product per KV head for all queries of its group, without copying keys per head.
    products = _products(grouped.flatten(1, 2), keys[0].transpose(-1, -2))
    return products.unflatten(1, grouped.shape[1:3])


def _products(left: Tensor, right: Tensor) -> Tensor:
    """Return the matrix products, (batch, rows, columns), of equal dtypes, summed in and returned as float32.

    Products of half-precision numbers are exact in float32, so tensor cores lose nothing here.
    """
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16) and _gives_float32(left.device):
        return torch.bmm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


@functools.cache
def _gives_float32(device: torch.device) -> bool:
    """Whether the device returns products of half-precision numbers in float32; torch 2.8 was the first to do so."""
    numbers = torch.ones(1, 8, 8, device=device, dtype=torch.bfloat16)
    try:
        return torch.bmm(numbers, numbers, out_dtype=torch.float32).dtype == torch.float32
    except (TypeError, RuntimeError):
        return False


def _share(products: Tensor, num_hidden: Tensor | None, scale: float, num_queries: int) -> Tensor:
    """Return these products' part of `mean_attention`: the weights summed over the queries, by `num_queries`."""
    logits = products * scale
    del products  # so that not more than two such arrays exist at a time
    if num_hidden is not None:
        positions = torch.arange(logits.shape[-1], device=logits.device)
        logits = logits.masked_fill(positions >= logits.shape[-1] - num_hidden.unsqueeze(-1), -torch.inf)
    return logits.softmax(dim=-1).sum(dim=2) / num_queries


CompressorClass = TypeVar("CompressorClass", bound=type[Compressor])
_REGISTRY: dict[str, type[Compressor]] = {}

# The trained compressor, which also needs heads.
RETAINING_HEADS = "retaining_heads"


def register_compressor(name: str) -> Callable[[CompressorClass], CompressorClass]:
    """Class decorator that registers a compressor under a name, for `APBConfig.compressor`."""

    def add(compressor: CompressorClass) -> CompressorClass:
        if name in _REGISTRY:
            raise ValueError(f"compressor={name!r} is already registered ({_REGISTRY[name].__name__}).")
        compressor.name = name
        _REGISTRY[name] = compressor
        if name not in COMPRESSORS:
            COMPRESSORS.append(name)
        return compressor

    return add


def compressor_names() -> tuple[str, ...]:
    """Return the names of all registered compressors, sorted."""
    return tuple(sorted(_REGISTRY))


def needs_heads(name: str | None) -> bool:
    """Whether the compressor of that name needs trained heads; False for an unknown name."""
    return name in _REGISTRY and _REGISTRY[name].needs_heads


def names_with_heads() -> str:
    """Return the names of the compressors that need trained heads, for messages."""
    return " or ".join(repr(name) for name in compressor_names() if _REGISTRY[name].needs_heads)


def build_compressor(settings: BlockSettings) -> Compressor:
    """Build the compressor that the settings name.

    Raises
    ------
    ValueError
        If the name is unknown, or the compressor needs the query in the anchor and the settings leave it out.
    """
    names = compressor_names()
    check_choice("compressor", settings.compressor, names)
    compressor = _REGISTRY[settings.compressor].from_settings(settings)
    if compressor.needs_anchor_queries and (not settings.query_in_anchor or settings.anchor_length == 0):
        raise ValueError(
            f"compressor={settings.compressor!r} scores with the query's tokens in the anchor; set "
            "query_in_anchor=true and an anchor_length that is not 0, or choose another compressor."
        )
    return compressor
