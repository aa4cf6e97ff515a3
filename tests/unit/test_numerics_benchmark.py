"""benchmarks/numerics.py on a small model, on the CPU."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from apb_ds.attention import APBAttention

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "numerics.py"
NUM_LAYERS = 3
SMALL = {
    "num-tokens": 520,
    "query-tokens": 8,
    "num-layers": NUM_LAYERS,
    "heads": 4,
    "kv-heads": 2,
    "head-dim": 16,
    "intermediate-size": 64,
    "vocab-size": 300,
    "sharpen": 8,  # so narrow a model would attend to all keys alike
    "device": "cpu",
}
# Roundings of float32 (24 bits) in some order: three orders of magnitude below those of bfloat16 (8 bits).
FLOAT32_ERROR = 2e-6
HALF_ERROR = 2e-2


@pytest.fixture
def numerics(monkeypatch: pytest.MonkeyPatch) -> Any:
    spec = importlib.util.spec_from_file_location("numerics_benchmark", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def arguments(dtype: str, out: Path) -> list[str]:
    given = {**SMALL, "dtype": dtype, "out": out}
    return [part for name, value in given.items() for part in (f"--{name}", str(value))]


def all_errors(measured: dict[str, Any]) -> list[float]:
    return [*measured["attention_output_error"], measured["logits_error"]]


def test_half_precision_is_close_to_the_reference(
    numerics: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "numerics.json"
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments("bfloat16", out)])
    numerics.main()
    record = json.loads(out.read_text(encoding="utf-8"))
    for name in numerics.MEASUREMENTS:
        errors = all_errors(record[name])
        # Half precision has 8 bits: smaller errors mean that both are the same, larger ones that one is wrong.
        assert len(errors) == NUM_LAYERS + 1 and all(1e-4 < error < HALF_ERROR for error in errors), (name, errors)
    same_states = record["attention_alone"]["attention_output_error"]
    assert len(same_states) == NUM_LAYERS
    for error, with_projections in zip(same_states, record["per_layer"]["attention_output_error"], strict=True):
        assert 1e-4 < error < with_projections
    for alone, added_up in (("per_layer", "end_to_end"), ("plain_model_per_layer", "plain_model")):
        alone_errors, added_up_errors = (
            record[alone]["attention_output_error"],
            record[added_up]["attention_output_error"],
        )
        assert alone_errors[0] == added_up_errors[0]  # the first layer is given embeddings, which half precision holds
        assert alone_errors[-1] < 0.9 * added_up_errors[-1]
        assert record[alone]["logits_error"] < record[added_up]["logits_error"]
    own = record["with_own_choices"]
    assert 0.8 < own["shared_choices"] <= 1.0
    assert own["logits_error"] >= record["end_to_end"]["logits_error"] / 2
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[-len(numerics.MEASUREMENTS) :]] == list(numerics.MEASUREMENTS)


def test_equal_precision_has_rounding_errors_only(numerics: Any, tmp_path: Path) -> None:
    record = numerics.measure(numerics.parse_arguments(arguments("float32", tmp_path / "unused")))
    for name in ("per_layer", "end_to_end", "plain_model", "plain_model_per_layer"):
        assert max(all_errors(record[name])) < FLOAT32_ERROR, (name, record[name])
    assert max(record["attention_alone"]["attention_output_error"]) < FLOAT32_ERROR


def test_a_wrong_scale_shows_in_its_layer(numerics: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong_layer = APBAttention.forward, 1

    def wrong(self: APBAttention, *states: Tensor, layer_idx: int, scale: float, **others: Any) -> Tensor:
        if self.config.kernel != numerics.REFERENCE_KERNEL and layer_idx == wrong_layer:
            scale = 0.5 * scale
        return right(self, *states, layer_idx=layer_idx, scale=scale, **others)

    monkeypatch.setattr(APBAttention, "forward", wrong)
    record = numerics.measure(numerics.parse_arguments(arguments("float32", tmp_path / "unused")))
    for layer_idx, error in enumerate(record["per_layer"]["attention_output_error"]):
        assert error > HALF_ERROR if layer_idx == wrong_layer else error < FLOAT32_ERROR, (layer_idx, error)
    for layer_idx, error in enumerate(record["attention_alone"]["attention_output_error"]):
        assert error > HALF_ERROR if layer_idx == wrong_layer else error < FLOAT32_ERROR, (layer_idx, error)
    # End to end, the layer behind is given what the wrong one made.
    assert record["end_to_end"]["attention_output_error"][wrong_layer + 1] > 100 * FLOAT32_ERROR
    assert max(all_errors(record["plain_model"])) < FLOAT32_ERROR


def test_hidden_states_of_mismatched_forwards_are_refused(numerics: Any, tmp_path: Path) -> None:
    model = numerics.make_model(numerics.parse_arguments(arguments("float32", tmp_path / "unused")), torch.float32)
    ids = torch.arange(12).unsqueeze(0)
    hidden = numerics.run_plain(model, ids, 2).hidden
    with pytest.raises(ValueError, match=r"layer 0, forward 0: \(1, 11, 64\) here, .*12, 64.* in the other run"):
        numerics.run_plain(model, ids[:, 1:], 2, hidden)
    assert not any(module._forward_pre_hooks for module in model.modules())
