"""Loading runs no code: not from weights, adapters or files next to a model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from apb_ds.loading import ModelConfig, load_model
from tests.tiny_checkpoint import save_checkpoint


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.file),)


@pytest.fixture
def sign(tmp_path: Path) -> Path:
    return tmp_path / "code was run"


def test_unpickling_it_runs_code(tmp_path: Path, sign: Path) -> None:
    torch.save({"x": Touch(sign)}, tmp_path / "x.bin")
    torch.load(tmp_path / "x.bin", weights_only=False)
    assert sign.exists()


@pytest.mark.parametrize("sharded", [False, True])
def test_weights(tmp_path: Path, sign: Path, sharded: bool) -> None:
    directory = save_checkpoint(tmp_path / "model")
    (directory / "model.safetensors").unlink()
    name = "pytorch_model-00001-of-00001.bin" if sharded else "pytorch_model.bin"
    torch.save({"model.norm.weight": Touch(sign)}, directory / name)
    if sharded:
        index = f'{{"metadata": {{}}, "weight_map": {{"model.norm.weight": "{name}"}}}}'
        (directory / "pytorch_model.bin.index.json").write_text(index)
    with pytest.raises(ValueError, match="objects other than tensors"):
        load_model(ModelConfig(path=str(directory), device="cpu"))
    assert not sign.exists()


def test_an_adapter(tmp_path: Path, sign: Path) -> None:
    peft = pytest.importorskip("peft")
    directory = save_checkpoint(tmp_path / "model")
    loaded = load_model(ModelConfig(path=str(directory), device="cpu"))
    adapted = peft.get_peft_model(loaded.model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    assert weights.is_file()
    weights.unlink()
    torch.save({"x": Touch(sign)}, tmp_path / "adapter" / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"model\.adapter"):
        load_model(ModelConfig(path=str(directory), device="cpu", adapter=str(tmp_path / "adapter")))
    assert not sign.exists()


def test_code_next_to_a_model_is_not_run(tmp_path: Path, sign: Path) -> None:
    """Whether or not config.json names it, unless model.trust_remote_code is true."""
    directory = save_checkpoint(tmp_path / "model")
    (directory / "own.py").write_text(f"import os\nos.mkdir({str(sign)!r})\n")
    config = (directory / "config.json").read_text()
    own = '{"auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}, "model_type": "own",'
    (directory / "config.json").write_text(config.replace("{", own, 1).replace('"model_type": "llama"', '"x": 1'))
    with pytest.raises(ValueError, match="trust_remote_code=true"):
        load_model(ModelConfig(path=str(directory), device="cpu"))
    assert not sign.exists()
    with pytest.raises(ValueError, match="config"):
        load_model(ModelConfig(path=str(directory), device="cpu", trust_remote_code=True))
    assert sign.exists(), "it runs if it is trusted"
