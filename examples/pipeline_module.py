"""A decoder written by hand as DeepSpeed's `PipelineModule`, with APB as its attention: two stages of two ranks each.

    deepspeed --num_accelerators 4 examples/pipeline_module.py

The rounds of a prefill are the micro-batches: the second stage computes one while the first computes the next. The
topology's axis ``data`` carries the ranks that share a document.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from deepspeed.runtime.pipe.topology import PipeDataParallelTopology
from torch import Tensor, nn

from apb_ds.attention import APBAttention, Phase
from apb_ds.cache import ShardedCache
from apb_ds.config import APBConfig
from apb_ds.methods.state import PrefillState
from apb_ds.plan import plan_request
from apb_ds.utils.sizes import LayerAttention

LAYERS, HEADS, HEAD_DIM, VOCAB = 4, 4, 16, 300
WIDTH = HEADS * HEAD_DIM


class Request:
    """What the layers of this rank share: how they attend, and the document's keys and values."""

    def __init__(self, config: APBConfig) -> None:
        self.config = config
        self.phase = Phase.PREFILL

    def begin(self, pipe: PipelineModule, num_tokens: int) -> PrefillState:
        """Begin a document."""
        self.attention = APBAttention(self.config, pipe.mpu().get_data_parallel_group())
        group = self.attention.group
        here = [layer.layer_idx for layer in pipe.forward_funcs if isinstance(layer, Layer)]
        layers = [LayerAttention(HEADS, HEADS, HEAD_DIM, HEAD_DIM, is_here=idx in here) for idx in range(LAYERS)]
        plan = plan_request(self.config, num_tokens, 0, group.world_size)
        self.cache = ShardedCache(layers, group.rank, group.world_size, plan.shard_length(group.rank))
        self.state, self.rounds = PrefillState(plan, self.cache, group.rank), Counter[int]()
        self.phase = Phase.PREFILL
        return self.state

    def attend(self, layer_idx: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend for (1, heads, tokens, head_dim) of this rank."""
        if self.phase is Phase.PREFILL:
            self.state.start_round(self.rounds[layer_idx])
            self.rounds[layer_idx] += 1
            return self.attention(query, key, value, phase=self.phase, layer_idx=layer_idx, state=self.state)
        key, value = self.cache.update(key, value, layer_idx)
        return self.attention(query, key, value, phase=self.phase, layer_idx=layer_idx, holds_new=self.cache.holds_new)


class Embedding(nn.Embedding):
    def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        ids, positions = inputs
        return super().forward(ids), positions


class Layer(nn.Module):
    def __init__(self, layer_idx: int, request: Request) -> None:
        super().__init__()
        self.layer_idx, self.request = layer_idx, request
        self.qkv, self.output = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.feed_forward = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, inputs: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        hidden, positions = inputs
        states = self.qkv(nn.functional.layer_norm(hidden, (WIDTH,)))
        query, key, value = states.unflatten(-1, (3, HEADS, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        seen = self.request.attend(self.layer_idx, rotate(query, positions), rotate(key, positions), value)
        hidden = hidden + self.output(seen.transpose(1, 2).flatten(2))
        return hidden + self.feed_forward(nn.functional.layer_norm(hidden, (WIDTH,))), positions


class Head(nn.Linear):
    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:  # type: ignore[override]
        return super().forward(nn.functional.layer_norm(inputs[0][:, -1:], (WIDTH,)))  # (1, 1, vocab)


def rotate(states: Tensor, positions: Tensor) -> Tensor:
    frequencies = 100.0 ** (-torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
    pairs = torch.view_as_complex(states.unflatten(-1, (-1, 2)).contiguous())
    turns = torch.polar(torch.ones(()), positions[0, :, None] * frequencies)
    return torch.view_as_real(pairs * turns).flatten(-2)


def make_engine(config: APBConfig, num_stages: int) -> tuple[Any, Request]:
    """Return DeepSpeed's engine over all ranks, and what its layers share."""
    deepspeed.init_distributed()
    request = Request(config)
    layers = [
        LayerSpec(Embedding, VOCAB, WIDTH),
        *(LayerSpec(Layer, layer_idx, request) for layer_idx in range(LAYERS)),
        LayerSpec(Head, WIDTH, VOCAB),
    ]
    ranks = torch.distributed.get_world_size() // num_stages
    topology = PipeDataParallelTopology(num_pp=num_stages, num_dp=ranks)
    seeded = {"seed_layers": True, "seed_fn": torch.manual_seed}  # the same weights on every rank of a stage
    pipe = PipelineModule(layers, topology=topology, dynamic_shape=True, **seeded)
    settings = {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    return deepspeed.initialize(model=pipe, config=settings)[0], request


def answer(engine: Any, request: Request, document: Tensor, query: Tensor) -> list[Tensor]:
    """Prefill a document, (1, n), and feed a query, (1, q), token by token; return its logits on the last stage."""
    state = request.begin(engine.module, document.shape[1])
    places = []
    for round_index in range(len(state.plan.rounds)):
        state.start_round(round_index)
        spans = [state.anchor_share, *(state.plan.blocks[host] for host in state.hosts)]
        places.append(torch.cat([torch.arange(*span) for span in spans])[None])
    run(engine, ((document[:, positions[0]], positions) for positions in places), len(places))
    request.cache.set_length(document.shape[1])
    request.phase = Phase.QUERY
    tokens = enumerate(query.split(1, dim=1), start=document.shape[1])
    return [run(engine, iter([(token, torch.tensor([[position]]))]), 1) for position, token in tokens]


def run(engine: Any, inputs: Iterator[tuple[Tensor, Tensor]], num_batches: int) -> Any:
    """Send micro-batches of this rank's tokens through the stages; return the last stage's output of the last one."""
    batches = ((one, torch.empty(0)) for one in inputs)  # DeepSpeed expects labels, too
    outputs = engine.eval_batch(
        batches, compute_loss=False, reduce_output=None, bcast_loss=False, num_micro_batches=num_batches
    )
    return outputs[-1] if outputs else None


if __name__ == "__main__":
    engine, request = make_engine(APBConfig(hosts=8), num_stages=2)
    generator = torch.Generator().manual_seed(0)
    document, query = (torch.randint(0, VOCAB, (1, length), generator=generator) for length in (2000, 5))
    logits = answer(engine, request, document, query)
    if engine.is_last_stage() and engine.grid.get_data_parallel_rank() == 0:
        print("next token:", int(logits[-1].argmax()))
