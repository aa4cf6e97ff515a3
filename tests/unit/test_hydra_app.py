"""Another application's Hydra config takes this package's groups, through the plugin that Hydra finds."""

from __future__ import annotations

import contextlib
import io
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.object_type import ObjectType
from hydra.errors import HydraException
from omegaconf import OmegaConf

import apb_ds
from apb_ds.config import config_and_heads
from hydra_plugins.apb_ds_configs import CONFIGS, PrefixedSource
from tests.tiny_checkpoint import save_checkpoint

APP = Path(__file__).resolve().parents[2] / "examples" / "hydra_app"
GIVEN = ["model=m", "text=t", "question=q"]


def composed(*overrides: str) -> Any:
    with initialize_config_dir(str(APP), version_base="1.3"):
        return compose("config", [*GIVEN, *overrides])


def test_an_application_composes_a_method() -> None:
    config = composed("apb_ds/method=star", "apb_ds.method.hosts=4", "+apb_ds/model=smollm2")
    made, heads = config_and_heads(config.apb_ds.method)
    assert made == apb_ds.APBConfig(method="star", hosts=4) and heads is None
    assert config.apb_ds.model.path.startswith("package://") and config.model == "m"
    with pytest.raises(HydraException, match="apb_ds/method/nope"):
        composed("apb_ds/method=nope")


def test_a_section_names_retaining_heads() -> None:
    section = {"compressor": "retaining_heads", "retaining_heads": "heads.pt", "hosts": None}
    assert config_and_heads(OmegaConf.create(section)) == (apb_ds.APBConfig(compressor="retaining_heads"), "heads.pt")
    assert config_and_heads(section, "others.pt")[1] == "others.pt"
    with pytest.raises(ValueError, match="config key='host' is not known"):
        config_and_heads({"host": 8})


def test_what_the_source_lists() -> None:
    source = PrefixedSource("apb_ds", f"apb_ds://{CONFIGS}")
    assert source.available()
    assert source.list("", None) == ["apb_ds"] and source.list("", ObjectType.CONFIG) == []
    assert source.list("apb_ds", ObjectType.GROUP) == ["method", "model"]
    assert source.list("apb_ds/method", ObjectType.CONFIG) == ["apb", "dense", "ring", "star", "ulysses"]
    assert not source.is_config("method/apb") and not source.is_group("method")


def test_this_packages_commands_do_not_see_their_groups_twice() -> None:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("infer", ["+apb_ds/method=apb"])
    assert config["apb_ds/method"] == "apb"  # a key like any other, not a group


def test_plugins_import_nothing_heavy_into_other_applications() -> None:
    code = (
        "import sys; from hydra.core.plugins import Plugins; Plugins.instance(); "
        "assert 'hydra_plugins.apb_ds_configs' in sys.modules; "
        "heavy = {'torch', 'apb_ds', 'launch'} & set(sys.modules); sys.exit(str(heavy) if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


def test_the_application_answers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = save_checkpoint(tmp_path)
    (tmp_path / "text.txt").write_text("The grass is green. " * 12, encoding="utf-8")
    arguments = [f"model={folder}", f"text={tmp_path / 'text.txt'}", "question=What?", "apb_ds.method.hosts=4"]
    argv = [str(APP / "app.py"), *arguments, f"hydra.run.dir={tmp_path}", "hydra.output_subdir=null"]
    with mock.patch("sys.argv", argv), contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(argv[0], run_name="__main__")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    engine = apb_ds.init_inference(AutoModelForCausalLM.from_pretrained(folder), {"hosts": 4})
    document, query = (
        tokenizer(part, return_tensors="pt").input_ids for part in ("The grass is green. " * 12, "\n\nWhat?\n")
    )
    answer = tokenizer.decode(engine.generate(document, query, max_new_tokens=16, do_sample=False)[0])
    assert f"Answer: {answer}\n" in printed.getvalue()
