"""Models whose weights somebody else has sharded: refused by name, or served as ZeRO-3 partitions them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import apb_ds
from tests.models import build_model, request_ids
from tests.pool import Pools

GIVEN: dict[str, Any] = {"hosts": 4, "anchor_length": 12, "passing_length": 5}
CONFIG = apb_ds.APBConfig(**GIVEN)


def deepspeed_engine(tp_size: int) -> Any:
    import deepspeed

    return deepspeed.init_inference(build_model("llama"), tensor_parallel={"tp_size": tp_size}, dtype=torch.float32)


def auto_tp(world_size: int, folder: str) -> nn.Module:
    model: nn.Module = deepspeed_engine(world_size).module
    return model


def tp_plan(world_size: int, folder: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    launched = {"RANK": str(torch.distributed.get_rank()), "LOCAL_RANK": "0", "WORLD_SIZE": str(world_size)}
    with mock.patch.dict(os.environ, launched):
        model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto", dtype=torch.float32)
    return model


def fsdp2(world_size: int, folder: str) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model: nn.Module = build_model("llama")
    fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    return model


def fsdp1(world_size: int, folder: str) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel(build_model("llama"), device_id=torch.device("cpu"))


def inside_fsdp1(world_size: int, folder: str) -> nn.Module:
    model: nn.Module = fsdp1(world_size, folder).module
    return model


REFUSED = {
    "auto_tp": (auto_tp, "DeepSpeed's tensor_parallel over 2 ranks (model.layers.0.self_attn.q_proj, LinearLayer)"),
    "tp_plan": (tp_plan, "DTensors, as transformers' tp_plan makes them, over 2 ranks (model.embed_tokens.weight)"),
    "fsdp2": (fsdp2, "FSDP (fully_shard) over 2 ranks (model.embed_tokens.weight)"),
    "fsdp1": (fsdp1, "FSDP over 2 ranks (_fsdp_wrapped_module._flat_param)"),
    "inside_fsdp1": (inside_fsdp1, "FSDP over 2 ranks (_flat_param)"),
}


def refuse(rank: int, world_size: int, name: str, folder: str) -> list[str]:
    """What `init_inference` says about a sharded model, asked to shard it and not, before it makes an engine."""
    make, _ = REFUSED[name]
    model, messages = make(world_size, folder), []
    for shard_weights in (False, True):
        with mock.patch.object(apb_ds.APBEngine, "__init__", None), pytest.raises(ValueError) as raised:
            apb_ds.init_inference(model, CONFIG, shard_weights=shard_weights)
        messages.append(str(raised.value))
    return messages


@pytest.mark.parametrize("name", REFUSED)
def test_sharded_weights_are_refused_by_name_on_every_rank(pool: Pools, tmp_path: Path, name: str) -> None:
    build_model("llama").save_pretrained(tmp_path)
    for messages in pool(2).run(refuse, name, str(tmp_path)):
        for message in messages:
            assert f"weights are sharded by {REFUSED[name][1]}" in message
            assert "whole weights; shard_weights=True" in message


def attach(rank: int, world_size: int) -> list[list[int]]:
    """Refuse an engine with tensor parallelism; answer with one whose tp_size is 1."""
    engine = deepspeed_engine(world_size)
    own = engine.generate
    with pytest.raises(ValueError, match=rf"tp_size={world_size} shards the model's weights.*shard_weights=True"):
        apb_ds.attach(engine, CONFIG)
    assert engine.generate == own
    engines = [apb_ds.attach(deepspeed_engine(1), CONFIG), apb_ds.init_inference(build_model("llama"), CONFIG)]
    document, query = request_ids(203, 9)
    return [engine.generate(document, query, max_new_tokens=5, do_sample=False)[0].tolist() for engine in engines]


def test_attach_refuses_tensor_parallelism_and_serves_engines_without(pool: Pools) -> None:
    for attached, whole in pool(2).run(attach):
        assert attached == whole
