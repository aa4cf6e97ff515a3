"""Models whose weights somebody else has sharded: refused by name, or served as ZeRO-3 partitions them."""

from __future__ import annotations

import contextlib
import io
import os
import runpy
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

import apb_ds
from tests.models import build_model, qwen2, request_ids
from tests.pool import Pools
from tests.tiny_checkpoint import save_checkpoint

GIVEN: dict[str, Any] = {"hosts": 4, "anchor_length": 12, "passing_length": 5}
CONFIG = apb_ds.APBConfig(**GIVEN)

pytestmark = pytest.mark.whole_weights("weights that others shard")
SCRIPT = Path(__file__).resolve().parents[2] / "examples" / "zero3_script.py"
QUESTION = "What colour is the sky?"


def launched() -> Any:
    """What launchers tell a process, as a patch of the environment."""
    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    told = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    return mock.patch.dict(os.environ, told)


def deepspeed_engine(tp_size: int) -> Any:
    import deepspeed

    return deepspeed.init_inference(build_model("llama"), tensor_parallel={"tp_size": tp_size}, dtype=torch.float32)


def auto_tp(world_size: int, folder: str) -> nn.Module:
    model: nn.Module = deepspeed_engine(world_size).module
    return model


def tp_plan(world_size: int, folder: str) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with launched():
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


METHODS: dict[str, tuple[dict[str, Any], int]] = {
    "apb": (GIVEN, 203),
    "idle ranks": ({"hosts": 8, "anchor_length": 0, "passing_length": 1, "schedule": "natural"}, 5),
    "several rounds": ({"hosts": 8, "anchor_length": 12, "passing_length": 5, "hosts_per_round": 1}, 203),
    "retaining heads": ({**GIVEN, "compressor": "retaining_heads"}, 203),
    "ring": ({"method": "ring"}, 203),
    "ulysses": ({"method": "ulysses"}, 203),
    "a short document": (GIVEN, 9),
}


def zero3(model: Any, threshold: int = 0, **settings: Any) -> Any:
    """DeepSpeed's engine over a model that ZeRO-3 partitions; weights of at most `threshold` numbers stay gathered."""
    import deepspeed

    zero = {"stage": 3, "stage3_param_persistence_threshold": threshold}
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, **settings}
    return deepspeed.initialize(model=model, config=config)[0]


def answers(engine: Any, num_document: int) -> dict[str, torch.Tensor]:
    """Logits and answers, alone and together, kept turns, and a document prefilled while others are answered."""
    document, query = request_ids(num_document, 9)
    reach = {"max_positions": num_document + 100}
    given = {"max_new_tokens": 5, "do_sample": False}
    context = engine.prefill(document, query, **reach)
    found = {"logits": engine.query_logits(query, context=context)}
    found["alone"] = engine.generate(query_ids=query, context=context, **given)
    queries = [request_ids(20, 3 + index, seed=index)[1] for index in range(3)]
    found["together"] = torch.cat(engine.generate(query_ids=queries, context=context, **given))
    with engine.batch(step_every_s=0.0) as batch:
        handles = [batch.submit(one, context=context, max_new_tokens=20, do_sample=False) for one in queries]
        batch.step()
        other = batch.prefill(request_ids(num_document, 5, seed=7)[0], query, **reach)
        batch.run()
    found["inside a prefill"] = torch.cat([handle.result() for handle in handles])
    found["turn"] = engine.generate(query_ids=query, context=other, append=True, **given)
    found["logits after a turn"] = engine.query_logits(query, context=other)
    return found


def answer(rank: int, world_size: int, family: str, case: str, threshold: int) -> list[str]:
    """Names of what differs, to the bit, from whole weights without oneDNN, which orders sums otherwise."""
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK

    from tests.heads import engine_with_heads

    given, num_document = METHODS[case]
    make = engine_with_heads if case == "retaining heads" else apb_ds.init_inference
    whole = make(build_model(family))
    whole.configure(apb_ds.APBConfig(**given))
    with torch.backends.mkldnn.flags(enabled=False):
        expected = answers(whole, num_document)
    with launched(), mock.patch("apb_ds.hf.tiled_mlps.CPU_TILE", 16):
        model = zero3(build_model(family), threshold).module
        depth = len(FWD_MODULE_STACK)
        engine = make(model)
        engine.configure(apb_ds.APBConfig(**given))
        found = answers(engine, num_document)
        engine.prefill(request_ids(num_document, 9)[0])
    assert len(FWD_MODULE_STACK) == depth
    assert not any(parameter.ds_active_sub_modules for parameter in model.parameters())
    for parameter in model.parameters():
        assert parameter.ds_persist or parameter.numel() == 0
    assert any(parameter.ds_persist for parameter in model.parameters()) == bool(threshold)
    return [name for name in expected if not torch.equal(expected[name], found[name])]


def check(pool: Pools, world_size: int, family: str, case: str, threshold: int = 0) -> None:
    for differing in pool(world_size).run(answer, family, case, threshold, timeout=120):
        assert differing == []


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "gpt_oss", "deepseek_v3"])
def test_weights_that_zero3_partitions_give_the_logits_of_whole_ones(pool: Pools, family: str) -> None:
    check(pool, 2, family, "apb")


@pytest.mark.parametrize("case", METHODS)
def test_methods(pool: Pools, case: str) -> None:
    check(pool, 4 if case == "idle ranks" else 2, "llama", case)


def test_small_weights_that_stay(pool: Pools) -> None:
    check(pool, 2, "llama", "apb", threshold=100)


def test_one_rank(pool: Pools) -> None:
    check(pool, 1, "llama", "apb")


def switched_off(rank: int, world_size: int) -> tuple[bool, bool]:
    """Whether steps are recorded and layers fused, where a device could."""
    with (
        launched(),
        mock.patch("apb_ds.engine.acceleration.can_record", return_value=True),
        mock.patch("apb_ds.engine.acceleration.fused_layers", return_value=None) as fused_layers,
    ):
        engine = apb_ds.init_inference(zero3(build_model("llama")).module, apb_ds.APBConfig(**GIVEN, fused=True))
    return engine._acceleration.recorded is not None, fused_layers.call_args.args[1]


def test_what_keeps_weights_is_off(pool: Pools) -> None:
    assert pool(1).run(switched_off) == [(False, False)]


def refuse_partitioned(rank: int, world_size: int, folder: str) -> None:
    """Refuse what ZeRO-3 does not allow, without a message that another rank would wait for."""
    from transformers import AutoModelForCausalLM
    from transformers.integrations import HfDeepSpeedConfig

    from apb_ds.parallel.groups import SequenceGroup

    with launched():
        model = zero3(build_model("llama")).module
        with pytest.raises(ValueError, match=r"ZeRO-3 partitions the model's weights already; leave shard_weights out"):
            apb_ds.init_inference(model, CONFIG, shard_weights=True)
        with pytest.raises(ValueError, match=rf"over ranks \[0, 1\], but ranks \[{rank}\] share a request"):
            apb_ds.init_inference(model, CONFIG, group=SequenceGroup())
        with pytest.raises(ValueError, match=r"mlp_tile=64 would gather an MLP's weights"):
            apb_ds.init_inference(model, apb_ds.APBConfig(**GIVEN, mlp_tile=64))
        partitions = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})
        model = AutoModelForCausalLM.from_pretrained(folder)
        del partitions  # only as long as it lives
        with pytest.raises(ValueError, match=r"embed_tokens\.weight is partitioned by DeepSpeed ZeRO-3.*initialize\("):
            apb_ds.init_inference(model, CONFIG)


def test_what_zero3_does_not_allow_is_refused(pool: Pools, tmp_path: Path) -> None:
    build_model("llama").save_pretrained(tmp_path)
    pool(2).run(refuse_partitioned, str(tmp_path))


def save_and_load(rank: int, world_size: int, folder: str) -> None:
    """Contexts of partitioned weights are those of whole ones, and of no others."""
    document, query = request_ids(203, 9)
    tied = {"tie_word_embeddings": True}
    with launched():
        model = zero3(qwen2(**tied)).module
        partitioned = apb_ds.init_inference(model, CONFIG)
        whole = apb_ds.init_inference(qwen2(**tied), CONFIG)
        other = apb_ds.init_inference(zero3(qwen2(seed=1, **tied)).module, CONFIG)
        assert partitioned.model_facts() == whole.model_facts()
        tokens = []
        for saves, loads in ((partitioned, whole), (whole, partitioned)):
            saves.prefill(document).save(folder)
            context = loads.load_context(folder)
            tokens.append(loads.generate(query_ids=query, context=context, max_new_tokens=5, do_sample=False).tolist())
            with pytest.raises(ValueError, match="another model: weights"):
                other.load_context(folder)
        assert tokens[0] == tokens[1]


def test_contexts_are_saved_and_loaded(pool: Pools, tmp_path: Path) -> None:
    pool(2).run(save_and_load, str(tmp_path / "context"))


def train(rank: int, world_size: int, serves: bool) -> list[float]:
    """Losses of three training steps, with an answer between them or not."""
    optimizer = {"type": "Adam", "params": {"lr": 1e-2, "torch_adam": True}}
    document, query = request_ids(203, 9)
    with launched():
        engine = zero3(build_model("llama").train().requires_grad_(True), optimizer=optimizer)
        losses, answered = [], []
        for _ in range(3):
            loss = engine(input_ids=document, labels=document).loss
            engine.backward(loss)
            engine.step()
            losses.append(float(loss))
            if serves:
                served = apb_ds.init_inference(engine.module, CONFIG)
                answered.append(served.query_logits(query, context=served.prefill(document)))
                served.detach()
                assert engine.module.training
        if serves:
            assert not torch.equal(answered[0], answered[1])
    return losses


def test_training_goes_on_to_the_bit(pool: Pools) -> None:
    assert pool(2).run(train, True) == pool(2).run(train, False)


def run_script(rank: int, world_size: int, folder: str) -> tuple[str, list[bool]]:
    """Run the example; return what it printed, and whether each weight is partitioned."""
    arguments = [str(SCRIPT), f"--local_rank={rank}", folder, f"{folder}/text.txt", QUESTION]
    with launched(), mock.patch("sys.argv", arguments), contextlib.redirect_stdout(io.StringIO()) as printed:
        names = runpy.run_path(str(SCRIPT), run_name="__main__")
    return printed.getvalue(), [hasattr(parameter, "ds_id") for parameter in names["model"].parameters()]


def test_the_example(pool: Pools, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert len(SCRIPT.read_text(encoding="utf-8").splitlines()) <= 40
    save_checkpoint(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = "The grass is green. The sky is blue. " * 8
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    document, query = (tokenizer(part, return_tensors="pt").input_ids for part in (text, f"\n\n{QUESTION}\n"))
    engine = apb_ds.init_inference(AutoModelForCausalLM.from_pretrained(tmp_path), apb_ds.APBConfig(hosts=8))
    assert not engine.prefill(document, query).plan.exact
    expected = tokenizer.decode(engine.generate(document, query, max_new_tokens=16, do_sample=False)[0])
    (printed, parts), (nothing, others) = pool(2).run(run_script, str(tmp_path))
    assert printed.endswith(f"Answer: {expected}\n")
    assert "Answer" not in nothing
    assert all(parts + others)
