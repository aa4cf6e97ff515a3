"""A decoder in plain torch, to use `APBAttention` as a layer without transformers and without the engine."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from apb_ds.attention import APBAttention, Phase
from apb_ds.cache import ShardedCache
from apb_ds.methods.state import PrefillState
from apb_ds.plan import Plan
from apb_ds.utils.sizes import LayerAttention

LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCAB = 2, 4, 2, 8, 300
WIDTH = HEADS * HEAD_DIM
LAYER = LayerAttention(HEADS, KV_HEADS, HEAD_DIM, HEAD_DIM)

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


def rotate(states: Tensor, positions: Tensor) -> Tensor:
    """Rotate (1, heads, tokens, head_dim) by `positions`, (tokens,): pairs of neighbouring channels."""
    frequencies = 100.0 ** (-torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    angles = positions[:, None] * frequencies
    pairs = torch.view_as_complex(states.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key_value = nn.Linear(WIDTH, 2 * KV_HEADS * HEAD_DIM)
        self.output = nn.Linear(WIDTH, WIDTH)
        self.feed_forward = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, hidden: Tensor, positions: Tensor, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        tokens = hidden.shape[1]
        normed = nn.functional.layer_norm(hidden, (WIDTH,))
        query = self.query(normed).view(1, tokens, HEADS, HEAD_DIM).transpose(1, 2)
        key, value = self.key_value(normed).view(1, tokens, 2, KV_HEADS, HEAD_DIM).permute(2, 0, 3, 1, 4)
        seen = attend(rotate(query, positions), rotate(key, positions), value)
        hidden = hidden + self.output(seen.transpose(1, 2).reshape(1, tokens, WIDTH))
        return hidden + self.feed_forward(nn.functional.layer_norm(hidden, (WIDTH,)))


class Decoder(nn.Module):
    """Two layers; `attend(layer_idx, query, key, value)` is the caller's."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in self.parameters():
                scale = 1.8 * parameter.shape[-1] ** -0.5 if parameter.dim() == 2 else 0.3
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
            self.embedding.weight.mul_(3.0)

    @torch.no_grad()
    def forward(self, ids: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Return logits, (1, tokens, vocab), of ids (1, tokens) at positions (tokens,)."""
        hidden = self.embedding(ids)
        for layer_idx, layer in enumerate(self.layers):

            def here(query: Tensor, key: Tensor, value: Tensor, layer_idx: int = layer_idx) -> Tensor:
                return attend(layer_idx, query, key, value)

            hidden = layer(hidden, positions, here)
        return nn.functional.layer_norm(hidden, (WIDTH,)) @ self.embedding.weight.T


def masked_attention(mask: Tensor) -> Attend:
    """Attention under a mask of (tokens, tokens), bool: may the row see the column?"""

    def attend(layer_idx: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = (states.repeat_interleave(HEADS // KV_HEADS, dim=1) for states in (key, value))
        logits = query @ key.transpose(-1, -2) * HEAD_DIM**-0.5
        return logits.masked_fill(~mask, -torch.inf).softmax(dim=-1) @ value

    return attend


def draw_ids(length: int, seed: int) -> Tensor:
    return torch.randint(0, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


def dense_logits(decoder: Decoder, ids: Tensor) -> Tensor:
    """The decoder's own logits under causal attention."""
    length = ids.shape[1]
    return decoder(ids, torch.arange(length), masked_attention(torch.ones(length, length, dtype=torch.bool).tril()))


def prefill_by_hand(decoder: Decoder, attention: APBAttention, plan: Plan, document: Tensor) -> ShardedCache:
    """Run the rounds of a plan without a query in its anchor, and return this rank's shard."""
    group = attention.group
    cache = ShardedCache([LAYER] * LAYERS, group.rank, group.world_size, plan.shard_length(group.rank))
    state = PrefillState(plan, cache, group.rank)

    def attend(layer_idx: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention(query, key, value, phase=Phase.PREFILL, layer_idx=layer_idx, state=state)

    for state.round_index in range(len(plan.rounds)):
        spans = [state.anchor_share, *(plan.blocks[host] for host in state.hosts)]
        positions = torch.cat([torch.arange(*span) for span in spans])
        decoder(document[:, positions], positions, attend)
    cache.set_length(document.shape[1])
    return cache


def ask_by_hand(decoder: Decoder, attention: APBAttention, cache: ShardedCache, ids: Tensor, phase: Phase) -> Tensor:
    """Feed new tokens over the cache; return their logits, the same on every rank."""
    start = cache.get_seq_length()

    def attend(layer_idx: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        keys, values = cache.update(key, value, layer_idx)
        return attention(query, keys, values, phase=phase, layer_idx=layer_idx, holds_new=cache.holds_new)

    return decoder(ids, torch.arange(start, start + ids.shape[1]), attend)
