"""What the engine refuses to serve, and that it changes nothing about a model: dtypes, devices or weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, init_empty_weights
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForSequenceClassification

import apb_ds
from apb_ds.engine import engine as engine_module
from apb_ds.hf.probe import probe_model
from tests.models import build_model, request_ids

CONFIG = apb_ds.APBConfig(hosts=4)
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 256,
    "is_decoder": True,
}


def build(model_type: str, **given: Any) -> Any:
    config = AutoConfig.for_model(model_type)
    for name, value in {**SMALL, **given}.items():
        if hasattr(config, name):
            setattr(config, name, value)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


def on_meta(tmp_path: Path) -> Any:
    return build_model("llama").to("meta")


def initialised_empty(tmp_path: Path) -> Any:
    with init_empty_weights():
        return AutoModelForCausalLM.from_config(build_model("llama").config)


def one_empty_layer(tmp_path: Path) -> Any:
    model = build_model("llama")
    model.model.layers[1].mlp.to("meta")
    return model


def offloaded_to_cpu(tmp_path: Path) -> Any:
    return cpu_offload(build_model("llama"), torch.device("cpu"))


def offloaded_to_disk(tmp_path: Path) -> Any:
    return disk_offload(build_model("llama"), str(tmp_path), torch.device("cpu"))


@pytest.mark.parametrize(
    "make", [on_meta, initialised_empty, one_empty_layer, offloaded_to_cpu, offloaded_to_disk], ids=lambda f: f.__name__
)
def test_weights_without_data_are_refused_and_left_alone(make: Any, tmp_path: Path) -> None:
    model = make(tmp_path)
    first = next(name for name, parameter in model.named_parameters() if parameter.is_meta)
    before = [(name, parameter, parameter.device) for name, parameter in model.named_parameters()]
    with pytest.raises(ValueError, match=f"{first} has no data"):
        apb_ds.init_inference(model, CONFIG)
    after = [(name, parameter, parameter.device) for name, parameter in model.named_parameters()]
    assert all(old[1] is new[1] and old[2] == new[2] for old, new in zip(before, after, strict=True))


def test_weights_that_others_partitioned_are_refused() -> None:
    from deepspeed.module_inject import LinearLayer

    model = build_model("llama")
    model.model.norm.weight.ds_id = 7
    with pytest.raises(ValueError, match=r"model\.norm\.weight.*ZeRO-3"):
        apb_ds.init_inference(model, CONFIG)
    model = build_model("llama")
    split = LinearLayer.__new__(LinearLayer)
    nn.Module.__init__(split)
    model.model.layers[0].mlp.up_proj = split
    with pytest.raises(ValueError, match=r"tensor_parallel.*\(model\.layers\.0\.mlp\.up_proj, LinearLayer\)"):
        apb_ds.init_inference(model, CONFIG)


def test_a_sharded_tensor_is_refused(tmp_path: Path) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model = build_model("llama")
        weight = distribute_tensor(model.model.norm.weight.data, init_device_mesh("cpu", (1,)), [Replicate()])
        model.model.norm.weight = nn.Parameter(weight)
        with pytest.raises(ValueError, match=r"sharded by DTensors.* over 1 ranks \(model\.norm\.weight\)"):
            apb_ds.init_inference(model, CONFIG)
    finally:
        torch.distributed.destroy_process_group()


def test_no_dtype_is_converted() -> None:
    """A model whose head and norms are in float32 under bfloat16 stays so, also after detach."""
    model = build_model("llama").bfloat16()
    model.lm_head.float()
    model.model.norm.float()
    model.lm_head.register_forward_pre_hook(lambda module, args: (args[0].float(),))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    document, query = request_ids(60, 5)
    with torch.no_grad():
        expected = model(torch.cat([document, query], dim=1)).logits[:, -5:]
    engine = apb_ds.init_inference(model, apb_ds.APBConfig(method="dense"))
    logits = engine.query_logits(query, context=engine.prefill(document))
    assert float((logits - expected).norm() / expected.norm()) < 0.03, "as half precision rounds"
    engine.detach()
    after = model.state_dict()
    assert all(
        after[name].dtype == tensor.dtype and torch.equal(after[name], tensor) for name, tensor in before.items()
    )


class Accelerator:
    """DeepSpeed's accelerator, but its device is one that tensors can always be moved to."""

    def __init__(self, original: Any) -> None:
        self._original = original

    def current_device_name(self) -> str:
        return "meta"

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


@pytest.mark.parametrize(
    ("mark", "moves"),
    [("", True), ("hf_device_map", False), ("hf_quantizer", False)],
    ids=["whole", "map", "quantiser"],
)
def test_what_moves_to_the_ranks_device(mark: str, moves: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "get_accelerator", lambda: Accelerator(None))
    model = build_model("llama")
    if mark:
        setattr(model, mark, {"": "cpu"})
    engine_module.move_to_accelerator(model)
    assert {parameter.is_meta for parameter in model.parameters()} == {moves}


def counting_positions_itself() -> Any:
    model = build_model("llama")
    rotary = model.model.rotary_emb
    forward = rotary.forward
    rotary.forward = lambda hidden, position_ids: forward(hidden, torch.arange(hidden.shape[1]).unsqueeze(0))
    return model


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (counting_positions_itself, "LlamaForCausalLM does not number positions from 0"),
        (lambda: build("roberta"), "RobertaForCausalLM does not number positions from 0"),
        (lambda: build("diffllama"), "DiffLlamaForCausalLM, layer 0, calls .* 2 times"),
        (lambda: build("bloom"), "BloomForCausalLM adds ALiBi .*build_alibi_tensor"),
        (lambda: build("falcon"), "FalconForCausalLM computes attention itself, without .*AttentionInterface"),
        (lambda: build("phimoe", sliding_window=16), r"masks its attention to sliding_window=16 tokens"),
        (lambda: build("mamba"), "MambaForCausalLM, layer 0, is a recurrent or convolution layer"),
        (lambda: build("llama4_text"), "layer 0, attends within chunks"),
        (lambda: build("bert", is_decoder=False), r"BertLMHeadModel, layer 0 .*does not attend causally"),
        (lambda: build_model("llama").model, "LlamaModel has no language-model head"),
        (lambda: LlamaForSequenceClassification(build_model("llama").config), "has no language-model head"),
        (lambda: "some/model", "'some/model' is a path or an id.*from_pretrained"),
        (lambda: torch.compile(build_model("llama")), r"compiled; pass model\._orig_mod"),
        (lambda: nn.DataParallel(build_model("llama")), r"DataParallel wraps a model; pass model\.module"),
    ],
)
def test_what_cannot_be_served_is_refused_for_the_true_reason(make: Any, named: str) -> None:
    model = make()
    with pytest.raises(ValueError, match=named):
        apb_ds.init_inference(model, CONFIG)


def test_an_adapter_is_to_be_merged() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build_model("llama"), peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"pass model\.merge_and_unload\(\)"):
        apb_ds.init_inference(model, CONFIG)


@pytest.mark.parametrize("model_type", ["stablelm", "biogpt", "opt", "gpt2", "afmoe"])
def test_what_calls_the_interface_is_exact_whatever_its_class_says(model_type: str) -> None:
    model = build(model_type)
    document, query = (ids % 60 for ids in request_ids(61, 5))
    with torch.no_grad():
        expected = model(torch.cat([document, query], dim=1)).logits[:, -5:].float()
    config = apb_ds.APBConfig(hosts=4, anchor_length=0, compression_ratio=1)
    engine = apb_ds.init_inference(model, config)
    logits = engine.query_logits(query, context=engine.prefill(document))
    assert float((logits - expected).abs().max() / expected.abs().max()) < 1e-4, "float32, sums in another order"


def test_a_window_in_the_config_that_no_layer_uses_is_not_one() -> None:
    model = build_model("llama")
    model.config.sliding_window = 8
    assert {layer.window for layer in probe_model(model)} == {None}
    document, query = request_ids(60, 5)
    assert apb_ds.init_inference(model, CONFIG).generate(document, query, max_new_tokens=2).shape == (1, 2)


def test_the_probe_leaves_the_model_as_it_was() -> None:
    model = build_model("mistral").train()
    model.model.layers[0].eval()
    before = copy.deepcopy(model.config.to_dict()), [module.training for module in model.modules()]
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    probe_model(model)
    assert before == (model.config.to_dict(), [module.training for module in model.modules()])
    assert hooks == [len(module._forward_pre_hooks) for module in model.modules()]
