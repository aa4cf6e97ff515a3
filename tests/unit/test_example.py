"""The example script runs as its docstring says, alone and under the launcher, and prints the engine's answer."""

from __future__ import annotations

import importlib.util
import os
import runpy
import subprocess
from pathlib import Path
from typing import Any

import pytest

import apb_ds
from tests.launching import deepspeed_command

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "deepspeed_script.py"


def run(command: list[str]) -> list[str]:
    """Run a command on the CPU from the repository's root; return the lines it printed."""
    launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in launched}
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment.update(DS_ACCELERATOR="cpu", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", PYTHONPATH=path)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.fixture(scope="module")
def expected() -> list[int]:
    """The tiny model's answer, by an engine of this process."""
    spec = importlib.util.spec_from_file_location("deepspeed_script", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    script: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    model, _, document, query = script.load_tiny()
    engine = apb_ds.init_inference(model, apb_ds.APBConfig(hosts=8))
    assert not engine.prefill(document, query).plan.exact
    return engine.generate(document, query, max_new_tokens=16, do_sample=False)[0].tolist()


def test_apb_is_three_lines() -> None:
    lines = SCRIPT.read_text(encoding="utf-8").splitlines()
    marked = [line for line in lines if "# APB, line" in line]
    assert len(marked) == 3
    unmarked = [line for line in lines if line not in marked]
    code = "\n".join(unmarked).split('"""', 2)[2]
    assert "apb" not in code.lower()


def test_alone(expected: list[int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.argv", [str(SCRIPT), "--tiny"])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert capsys.readouterr().out.splitlines()[-2:] == ["408 prompt tokens on 1 ranks", f"Answer: {expected}"]


@pytest.mark.launcher
def test_under_the_launcher(expected: list[int]) -> None:
    lines = run([*deepspeed_command(), str(SCRIPT), "--tiny"])
    assert "408 prompt tokens on 2 ranks" in lines
    assert [line for line in lines if line.startswith("Answer: ")] == [f"Answer: {expected}"]
