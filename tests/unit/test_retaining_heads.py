"""Retaining heads: reading checkpoints, refusing bad ones, engines and scripts that use them, cleaning up."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from torch import Tensor, nn

import apb_ds
from apb_ds.compressors.retaining_heads import HeadSizes, RetainingHeads, read_heads, write_heads
from apb_ds.compressors.retaining_heads.convert import main as convert
from apb_ds.hf.interface import captured_projections, check_projections, projection_modules
from apb_ds.loading.heads import head_sizes, load_heads
from apb_ds.session import read_settings
from tests.heads import HIDDEN, random_checkpoint, save_heads
from tests.launch_in_process import run_infer
from tests.models import build_model, distinct_ids, request_ids
from tests.reference import run_reference
from tests.reference_scores import retaining_heads
from tests.tiny_checkpoint import save_checkpoint

GIVEN: dict[str, Any] = {"hosts": 4, "anchor_length": 12, "passing_length": 4, "compressor": "retaining_heads"}
CONFIG = apb_ds.APBConfig(**GIVEN)
SIZES = HeadSizes(num_layers=3, heads=4, kv_heads=2, head_dim=16, activation="silu")
KEY = "model.layers.{}.self_attn.{}.weight"


@pytest.fixture(scope="module")
def checkpoint() -> dict[str, Any]:
    return random_checkpoint(build_model("llama"))


@pytest.fixture(scope="module")
def heads_file(checkpoint: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_heads(tmp_path_factory.mktemp("heads") / "heads.pt", checkpoint)


def is_checkpoint(heads: RetainingHeads, checkpoint: dict[str, Any]) -> bool:
    state = heads.published_state()
    return len(state) == 6 and all(torch.equal(tensor, checkpoint[key]) for key, tensor in state.items())


# --- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["heads.pt", "heads.bin", "heads.pth", "heads.safetensors"])
@pytest.mark.parametrize("whole_folder", [False, True])
def test_every_format_is_read(checkpoint: dict[str, Any], tmp_path: Path, name: str, whole_folder: bool) -> None:
    file = save_heads(tmp_path / name, checkpoint)
    heads = read_heads(tmp_path if whole_folder else file, SIZES)
    assert is_checkpoint(heads, checkpoint)
    assert heads.hidden_size == HIDDEN
    assert not any(parameter.requires_grad for parameter in heads.parameters())


def test_a_checkpoint_in_parts_is_read(checkpoint: dict[str, Any], tmp_path: Path) -> None:
    for layer in range(3):
        part = {key: tensor for key, tensor in checkpoint.items() if key.startswith(f"model.layers.{layer}.self")}
        save_heads(tmp_path / f"part{layer}.safetensors", part)
    save_heads(tmp_path / "old.pt", {KEY.format(0, "fc1"): torch.zeros(1, 1)})  # ignored next to safetensors
    assert is_checkpoint(read_heads(tmp_path, SIZES), checkpoint)


def test_other_objects_are_ignored(checkpoint: dict[str, Any], tmp_path: Path) -> None:
    file = save_heads(tmp_path / "heads.pt", {**checkpoint, "step": 3000, "config": {"lr": 5e-4}})
    assert is_checkpoint(read_heads(file, SIZES), checkpoint)


def test_scores_match_the_formula(checkpoint: dict[str, Any]) -> None:
    """Against the slow reference, for one block; the engine's tests do the same through models."""
    from apb_ds.compressors import BlockStates
    from apb_ds.compressors.retaining_heads import RetainingHeadsCompressor
    from apb_ds.compressors.retaining_heads.checkpoint import _heads_from
    from tests.reference_scores import ScoreInput

    generator = torch.Generator().manual_seed(3)
    compressor = RetainingHeadsCompressor(_heads_from(checkpoint, SIZES))
    slow = retaining_heads(checkpoint, torch.nn.functional.silu)
    for tokens in (1, 3, 40):
        projections = torch.randn(1, tokens, SIZES.qkv_size, generator=generator)
        keys, queries = torch.zeros(1, 2, tokens, 16), torch.zeros(1, 4, tokens, 16)
        block = BlockStates(queries, keys, keys, 0, 1, 1.0, projections=projections)
        expected = slow(ScoreInput(queries[0], keys[0], queries[0], torch.arange(tokens), 1.0, 1, 0, projections[0]))
        scores = compressor.score(block)
        assert scores.dtype == torch.float32 and scores.shape == (2, tokens)
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)  # float32 sums of 128 and 24 terms of size 1


def test_scores_with_the_window_match_the_formula(checkpoint: dict[str, Any]) -> None:
    from apb_ds.compressors import BlockStates
    from apb_ds.compressors.heads_and_window import HeadsAndWindowCompressor
    from apb_ds.compressors.retaining_heads.checkpoint import _heads_from
    from tests.reference_scores import ScoreInput, heads_and_window

    generator = torch.Generator().manual_seed(4)
    compressor = HeadsAndWindowCompressor(_heads_from(checkpoint, SIZES))
    slow = heads_and_window(checkpoint, torch.nn.functional.silu)
    for tokens in (1, 3, 40, 70):
        projections = torch.randn(1, tokens, SIZES.qkv_size, generator=generator)
        keys, queries = (torch.randn(1, heads, tokens, 16, generator=generator) for heads in (2, 4))
        values = projections[0, :, -32:].unflatten(1, (2, 16)).transpose(0, 1).unsqueeze(0)
        block = BlockStates(queries, keys, values, 0, 1, 0.25, projections=projections)
        given = ScoreInput(queries[0], keys[0], queries[0], torch.arange(tokens), 0.25, 1, 0, projections[0])
        scores, expected = compressor.score(block), slow(given)
        assert scores.dtype == torch.float32 and scores.shape == (2, tokens)
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)
        assert tokens == 1 or not torch.allclose(expected, retaining_heads(checkpoint, torch.nn.functional.silu)(given))


def test_scores_without_projections_are_refused(checkpoint: dict[str, Any]) -> None:
    from apb_ds.compressors import BlockStates
    from apb_ds.compressors.retaining_heads import RetainingHeadsCompressor

    states = torch.zeros(1, 2, 5, 16)
    compressor = RetainingHeadsCompressor(RetainingHeads.random(SIZES, 8))
    with pytest.raises(ValueError, match=r"PrefillState\.projections"):
        compressor.score(BlockStates(states, states, states, 0, 0, 1.0))


Edit = Callable[[dict[str, Any]], None]


def without(*keys: str) -> Edit:
    return lambda state: [state.pop(key) for key in keys] and None


def put(key: str, tensor: Any) -> Edit:
    return lambda state: state.update({key: tensor})


def nothing_but_extras(state: dict[str, Any]) -> None:
    for key in [key for key in state if ".self_attn.fc" in key]:
        del state[key]


BAD: dict[str, tuple[Edit, tuple[str, ...]]] = {
    "no heads": (nothing_but_extras, ("has no retaining heads", KEY.format(0, "fc1"))),
    "a missing layer": (
        without(KEY.format(1, "fc1"), KEY.format(1, "fc2")),
        ("lacks model.layers.1.self_attn.fc1.weight, model.layers.1.self_attn.fc2.weight", "3 layers"),
    ),
    "missing in several layers": (
        without(*(KEY.format(layer, "fc2") for layer in (0, 1, 2))),
        ("lacks model.layers.0.self_attn.fc2.weight, model.layers.1.self_attn.fc2.weight",),
    ),
    "a layer too many": (
        put(KEY.format(3, "fc1"), torch.zeros(HIDDEN, 128)),
        ("model.layers.3.self_attn.fc1.weight", "3 layers"),
    ),
    "a bias": (
        put("model.layers.0.self_attn.fc1.bias", torch.zeros(HIDDEN)),
        ("has model.layers.0.self_attn.fc1.bias",),
    ),
    "another model's channels": (
        put(KEY.format(2, "fc1"), torch.zeros(HIDDEN, 96)),
        ("model.layers.2.self_attn.fc1.weight is (24, 96), not (24, 128)", "4 heads and 2 KV heads of 16"),
    ),
    "other KV heads": (
        put(KEY.format(0, "fc2"), torch.zeros(3, HIDDEN)),
        ("model.layers.0.self_attn.fc2.weight is (3, 24), not (2, 24)",),
    ),
    "another hidden size in one layer": (
        put(KEY.format(1, "fc1"), torch.zeros(16, 128)),
        ("model.layers.1.self_attn.fc1.weight is (16, 128), not (24, 128)",),
    ),
    "a vector": (
        put(KEY.format(0, "fc1"), torch.zeros(24)),
        ("model.layers.0.self_attn.fc1.weight is (24,), not (24, 128)",),
    ),
    "integers": (put(KEY.format(0, "fc1"), torch.zeros(24, 128, dtype=torch.int64)), ("of torch.int64",)),
    "not numbers": (
        put(KEY.format(1, "fc2"), torch.full((2, HIDDEN), torch.nan)),
        ("model.layers.1.self_attn.fc2.weight", "not finite"),
    ),
}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("name", BAD)
def test_bad_checkpoints_are_refused(checkpoint: dict[str, Any], tmp_path: Path, name: str, suffix: str) -> None:
    edit, parts = BAD[name]
    state = dict(checkpoint)
    edit(state)
    file = save_heads(tmp_path / f"heads{suffix}", state)
    with pytest.raises(ValueError) as caught:
        read_heads(file, SIZES)
    for part in (str(file), *parts):
        assert part in str(caught.value)


class Malicious:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("ran_code"),)


def test_no_code_in_a_checkpoint_is_run(
    checkpoint: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({**checkpoint, "extra": Malicious()}, "heads.pt")
    with pytest.raises(ValueError, match=r"heads\.pt.*cannot be read as tensors.*would run code"):
        read_heads(Path("heads.pt"), SIZES)
    assert not Path("ran_code").exists()


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (lambda folder: folder / "nope.pt", "does not exist"),
        (lambda folder: folder, "is a directory without *.safetensors, *.pt"),
        (lambda folder: _written(folder / "heads.txt", b"x"), "heads.txt is not one of *.safetensors, *.pt"),
        (lambda folder: _written(folder / "heads.pt", b"no pickle"), "cannot be read as tensors"),
        (lambda folder: _written(folder / "heads.safetensors", b"cut off"), "cannot be read as tensors"),
        (lambda folder: _saved(folder / "heads.pt", [torch.ones(1)]), "holds a list"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, make: Callable[[Path], Path], part: str) -> None:
    with pytest.raises(ValueError, match="retaining_heads=") as caught:
        read_heads(make(tmp_path), SIZES)
    assert part in str(caught.value)


def _written(file: Path, content: bytes) -> Path:
    file.write_bytes(content)
    return file


def _saved(file: Path, content: Any) -> Path:
    torch.save(content, file)
    return file


def test_heads_twice_in_a_folder_are_refused(checkpoint: dict[str, Any], tmp_path: Path) -> None:
    for name in ("step100.pt", "step200.pt"):
        save_heads(tmp_path / name, checkpoint)
    with pytest.raises(ValueError, match=r"step200\.pt and another file.*model\.layers\.0\..* and 3 more"):
        read_heads(tmp_path, SIZES)


def test_the_converter(
    checkpoint: dict[str, Any], heads_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "new" / "heads.safetensors"
    assert convert([str(heads_file), str(target)]) == 0
    assert "6 tensors" in capsys.readouterr().out
    assert set(load_file(target)) == {key for key in checkpoint if ".self_attn.fc" in key}
    assert is_checkpoint(read_heads(target, SIZES), checkpoint)
    for arguments, part in [
        ([heads_file, target], f"OUT={str(target)!r} exists"),
        ([heads_file, tmp_path / "heads.pt"], "must end in .safetensors"),
        ([tmp_path / "nope.pt", tmp_path / "other.safetensors"], "does not exist"),
        (
            [save_heads(tmp_path / "none.pt", {"x": torch.ones(1)}), tmp_path / "other.safetensors"],
            "no retaining heads",
        ),
    ]:
        assert convert([str(argument) for argument in arguments]) == 2
        assert part in capsys.readouterr().err
    assert not (tmp_path / "other.safetensors").exists()


def test_the_converter_runs_as_a_module() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "apb_ds.compressors.retaining_heads.convert", "--help"],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=Path(__file__).resolve().parents[2],
    )
    assert done.returncode == 0 and "IN OUT" in done.stdout


def test_random_heads_are_written_and_read_again(tmp_path: Path) -> None:
    heads = RetainingHeads.random(SIZES, 8, seed=1)
    write_heads(heads, tmp_path / "heads.safetensors")
    assert is_checkpoint(read_heads(tmp_path, SIZES), dict(heads.published_state()))
    assert not torch.equal(heads.layers[0].fc1, RetainingHeads.random(SIZES, 8, seed=2).layers[0].fc1)
    assert heads.products_per_token == 8 * 128 + 2 * 8


def test_number_of_parameters_of_a_published_checkpoint() -> None:
    one_layer = RetainingHeads.random(HeadSizes(1, 32, 8, 128, "silu"), 1024)
    assert 32 * one_layer.products_per_token == 201_588_736  # Llama-3.1-8B


# --- engines --------------------------------------------------------------------------------------------------------


def query_logits(engine: Any) -> Tensor:
    document, query = request_ids(130, 6)
    return engine.query_logits(query, context=engine.prefill(document, query))


@pytest.mark.parametrize(
    ("compressor", "given", "parts"),
    [
        ("retaining_heads", None, ("compressor='retaining_heads' needs trained heads", ".safetensors")),
        (
            "window",
            "heads.pt",
            ("retaining_heads='heads.pt' goes with compressor='heads_and_window' or 'retaining_heads', not 'window'",),
        ),
        ("retaining_heads", "/no/such.pt", ("retaining_heads='/no/such.pt'", "does not exist")),
        ("retaining_heads", "no/such", ("retaining_heads='no/such'", "Looked in", "hub cache", "HF_HUB_OFFLINE")),
    ],
)
def test_engines_refuse_bad_heads_before_ranks_meet(
    monkeypatch: pytest.MonkeyPatch, compressor: str, given: str | None, parts: tuple[str, ...]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("apb_ds.engine.api.world_group", lambda *_: pytest.fail("the group is joined"))
    with pytest.raises(ValueError) as caught:
        apb_ds.init_inference(build_model("llama"), apb_ds.APBConfig(compressor=compressor), retaining_heads=given)
    assert all(part in str(caught.value) for part in parts)


def test_heads_of_another_model_are_refused(heads_file: Path) -> None:
    for given in (heads_file, RetainingHeads.random(SIZES, 8)):
        with pytest.raises(ValueError, match=r"is \(\d+, 128\), not \(\d+, 256\)"):
            apb_ds.init_inference(build_model("qwen3"), CONFIG, retaining_heads=given)


def test_heads_stay_when_settings_change(heads_file: Path) -> None:
    engine = apb_ds.init_inference(build_model("llama"), CONFIG, retaining_heads=heads_file)
    first = query_logits(engine)
    engine.configure(apb_ds.APBConfig(hosts=4, compressor="recent"))
    with pytest.raises(ValueError, match="goes with compressor"):
        engine.configure(apb_ds.APBConfig(hosts=4), heads_file)
    assert engine.apb_config.compressor == "recent"
    engine.configure(CONFIG)
    assert torch.equal(query_logits(engine), first)
    engine.configure(CONFIG, RetainingHeads.random(SIZES, 8))
    assert float((query_logits(engine) - first).abs().max()) > 1e-3


def test_exact_methods_and_exact_requests_need_no_scores(heads_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RetainingHeads, "forward", lambda *_: pytest.fail("a head is asked"))
    model = build_model("llama")
    apb_ds.init_inference(model, apb_ds.APBConfig(method="dense"))  # without heads
    engine = apb_ds.init_inference(model, apb_ds.APBConfig(compressor="retaining_heads"), retaining_heads=heads_file)
    document, query = request_ids(60, 9)
    assert engine.prefill(document, query).plan.exact
    engine.configure(apb_ds.APBConfig(**{**GIVEN, "passing_length": 40}))  # all eligible tokens are passed
    assert not engine.prefill(*request_ids(130, 6)).plan.exact


def test_heads_are_in_the_models_dtype(heads_file: Path) -> None:
    engine = apb_ds.init_inference(build_model("llama").bfloat16(), CONFIG, retaining_heads=heads_file)
    (heads,) = {id(engine.attention.compressor.heads): engine.attention.compressor.heads}.values()
    assert heads.layers[0].fc1.dtype == torch.bfloat16
    assert bool(query_logits(engine).isfinite().all())


def test_the_model_is_unchanged_afterwards(heads_file: Path) -> None:
    model = build_model("llama")
    names = list(model.state_dict())
    engine = deepspeed.init_inference(model, dtype=torch.float32)
    with torch.no_grad():
        before = model(input_ids=distinct_ids(90), use_cache=False).logits
    attached = apb_ds.attach(engine, CONFIG, retaining_heads=str(heads_file))
    query_logits(attached)
    assert list(attached.module.state_dict()) == names == list(model.state_dict())
    assert not any("fc1" in name for name, _ in attached.named_parameters())
    assert not any(module._forward_hooks for module in model.modules())
    apb_ds.detach(attached)
    with torch.no_grad():
        assert torch.equal(model(input_ids=distinct_ids(90), use_cache=False).logits, before)


def test_hooks_are_removed_when_a_layer_fails(heads_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = apb_ds.init_inference(build_model("llama"), CONFIG, retaining_heads=heads_file)
    expected = query_logits(engine)
    with monkeypatch.context() as patch:
        patch.setattr(RetainingHeads, "forward", lambda *_: torch.empty(0, 0))
        with pytest.raises((RuntimeError, IndexError, AssertionError)):
            query_logits(engine)
    assert not any(module._forward_hooks for module in engine.module.modules())
    assert torch.equal(query_logits(engine), expected)


def test_projections_are_kept_for_one_layer_and_only_if_scored(
    heads_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from apb_ds.hf.interface import ActiveCall

    held, scored = [], []
    keep, score = ActiveCall.keep_projection, RetainingHeads.forward

    def count(self: ActiveCall, layer_idx: int, output: Tensor) -> None:
        keep(self, layer_idx, output)
        assert self.state is not None
        held.append((self.state.hosts, layer_idx, len(self.projections)))

    def note(self: RetainingHeads, layer_idx: int, projections: Tensor) -> Tensor:
        scored.append(layer_idx)
        return score(self, layer_idx, projections)

    monkeypatch.setattr(ActiveCall, "keep_projection", count)
    monkeypatch.setattr(RetainingHeads, "forward", note)
    engine = apb_ds.init_inference(build_model("llama"), CONFIG, retaining_heads=heads_file)
    query_logits(engine)
    # Three of four hosts pass tokens on, in the first two of three layers.
    assert scored == [0, 1] * 3
    assert max(number for _, _, number in held) == 3
    assert {number for host, layer, number in held if host == (3,) or layer == 2} == {0}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3"])
def test_the_input_of_a_head(family: str) -> None:
    """The output of the linear layers: with Qwen2's biases, before Qwen3's norms, from Phi-3's single projection."""
    model = build_model(family)
    seen: dict[int, list[Tensor]] = {}
    with torch.no_grad(), captured_projections(model, lambda layer, output: seen.setdefault(layer, []).append(output)):
        states = model(input_ids=distinct_ids(20), output_hidden_states=True).hidden_states
    assert states is not None
    module = model.base_model.layers[1]
    hidden = module.input_layernorm(states[1])
    names = ("qkv_proj",) if family == "phi3" else ("q_proj", "k_proj", "v_proj")
    for name, output in zip(names, seen[1], strict=True):
        linear = getattr(module.self_attn, name)
        bias = 0 if linear.bias is None else linear.bias
        torch.testing.assert_close(output, hidden @ linear.weight.T + bias)
        assert (linear.bias is not None) == (family == "qwen2")
    assert torch.cat(seen[1], dim=-1).shape == (1, 20, head_sizes(model).qkv_size)


def test_models_with_other_projections_are_refused(heads_file: Path) -> None:
    model = build_model("llama")
    attention = model.base_model.layers[2].self_attn
    attention.query = attention.q_proj
    del attention.q_proj
    assert projection_modules(attention) == []
    with pytest.raises(ValueError, match=r"layer 2 \(LlamaAttention\).*no such projections"):
        apb_ds.init_inference(model, CONFIG, retaining_heads=heads_file)
    wide = build_model("llama")
    wide.base_model.layers[0].self_attn.q_proj = nn.Linear(64, 128)  # as if it also projected a gate
    with pytest.raises(ValueError, match="128 channels together; layer 0"):
        check_projections(wide)


def test_a_model_without_an_activation_is_refused() -> None:
    model = build_model("llama")
    model.config.hidden_act = ""
    with pytest.raises(ValueError, match="no hidden_act"):
        head_sizes(model)


def test_a_hub_id_is_found_in_the_cache(
    checkpoint: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--thunlp--APB-Locret-tiny"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    with pytest.raises(ValueError, match=r"without \*\.safetensors or \*\.pt"):
        apb_ds.init_inference(build_model("llama"), CONFIG, retaining_heads="thunlp/APB-Locret-tiny")
    save_heads(snapshot / "retaining_heads.bin", checkpoint)
    engine = apb_ds.init_inference(build_model("llama"), CONFIG, retaining_heads="thunlp/APB-Locret-tiny")
    document, query = request_ids(130, 6)
    scorer = retaining_heads(checkpoint, torch.nn.functional.silu)
    expected = run_reference(build_model("llama"), document, query, scorer=scorer, **GIVEN).logits
    assert float((query_logits(engine) - expected).abs().max()) < 1e-4


def test_heads_in_a_package_are_found(
    checkpoint: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "heads_of_mine"
    (package / "trained").mkdir(parents=True)
    (package / "__init__.py").touch()
    save_heads(package / "trained" / "heads.safetensors", checkpoint)
    monkeypatch.syspath_prepend(tmp_path)
    assert is_checkpoint(load_heads("package://heads_of_mine/trained", SIZES), checkpoint)


# --- launch scripts -------------------------------------------------------------------------------------------------


def settings(method: dict[str, Any], model: dict[str, Any]) -> Any:
    values = {"method": method, "model": {"path": "x", **model}, "task": {"name": "passkey"}}
    return read_settings(values).retaining_heads


@pytest.mark.parametrize(
    ("method", "model", "found"),
    [
        ({}, {}, None),
        ({}, {"retaining_heads": "a/b"}, None),  # a model's heads do not choose the compressor
        ({"compressor": "retaining_heads"}, {"retaining_heads": "a/b"}, "a/b"),
        ({"compressor": "retaining_heads", "retaining_heads": "c.pt"}, {"retaining_heads": "a/b"}, "c.pt"),
        ({"compressor": "retaining_heads", "retaining_heads": "c.pt"}, {}, "c.pt"),
        ({"method": "dense"}, {"retaining_heads": "a/b"}, None),
    ],
)
def test_where_settings_take_heads_from(method: dict[str, Any], model: dict[str, Any], found: str | None) -> None:
    assert settings(method, model) == found


@pytest.mark.parametrize(
    ("method", "model", "part"),
    [
        ({"compressor": "retaining_heads"}, {}, "method.compressor=retaining_heads needs trained heads"),
        ({"compressor": "heads_and_window"}, {}, "launch/train_heads.py"),
        (
            {"retaining_heads": "c.pt"},
            {},
            "method.retaining_heads='c.pt' goes with method.compressor='heads_and_window' or 'retaining_heads'",
        ),
        ({"method": "dense", "retaining_heads": "c.pt"}, {}, "method.retaining_heads='c.pt' goes with"),
        ({"compressor": "retaining_heads", "retaining_heads": 3}, {}, "method.retaining_heads=3 must be"),
        ({}, {"retaining_heads": ""}, "model.retaining_heads='' must be"),
    ],
)
def test_bad_settings(method: dict[str, Any], model: dict[str, Any], part: str) -> None:
    with pytest.raises(ValueError) as caught:
        settings(method, model)
    assert part in str(caught.value)


def test_a_sweep_with_and_without_heads(tmp_path: Path) -> None:
    model = save_checkpoint(tmp_path / "model")
    heads = save_heads(tmp_path / "heads.pt", random_checkpoint(_loaded(model)))
    common = [f"model.path={model}", "model.device=cpu", "task.num_tokens=300", "task.max_new_tokens=2"]
    common += ["method.hosts=4", f"hydra.sweep.dir={tmp_path}/sweep", f"hydra.run.dir={tmp_path}/run"]
    compressors = "method.compressor=retaining_heads,window,retaining_heads"
    ended = run_infer(0, 1, ["-m", compressors, f"model.retaining_heads={heads}", *common])
    assert (ended.code, ended.errors) == (0, [None, None, None]), ended.stderr
    ended = run_infer(0, 1, ["method.compressor=retaining_heads", "model.retaining_heads=null", *common])
    assert ended.code == 2 and "needs trained heads" in ended.stderr
    ended = run_infer(0, 1, ["method.compressor=retaining_heads", *common])  # model=smollm2 names no heads
    assert ended.code == 2 and "launch/train_heads.py" in ended.stderr
    ended = run_infer(0, 1, ["method.compressor=retaining_heads", f"method.retaining_heads={tmp_path}/x.pt", *common])
    assert ended.code == 2 and "x.pt" in ended.stderr and "does not exist" in ended.stderr


def test_the_records_of_the_study_name_the_heads_of_the_card() -> None:
    results = Path(__file__).resolve().parents[2] / "docs" / "results" / "compressors"
    study = (results.parents[1] / "compressors.md").read_text(encoding="utf-8")
    card = (results / "smollm2_heads" / "README.md").read_text(encoding="utf-8")
    training = json.loads((results / "smollm2_heads" / "training.json").read_text())
    assert f"{training['parameters']:,} parameters" in card
    measured = [json.loads(record.read_text())["heads"] for record in sorted(results.glob("kl_*.json"))]
    digests = [heads["sha256"] for heads in measured if heads is not None]  # not every record has a row of them
    assert len(digests) == 6 and len(set(digests)) == 1
    assert digests[0] in card and digests[0] in study


def _loaded(directory: Path) -> Any:
    from transformers import AutoConfig

    return SimpleNamespace(config=AutoConfig.from_pretrained(directory))
