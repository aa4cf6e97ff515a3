"""The server's settings: what is refused, by name, and what they become."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from apb_ds.serving import run
from apb_ds.serving.config import ServeConfig, is_loopback
from apb_ds.serving.run import read_serve_settings
from apb_ds.session.steps import JobError, Steps
from launch.quoting import readable
from tests.tiny_checkpoint import byte_tokenizer

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
COUNTS = ("min_document", "max_rest", "default_new_tokens", "max_sequences", "max_connections")
NUMBERS = (
    *("device_gib", "host_gib", "disk_gib", "step_every_s", "body_mib", "body_s", "request_s", "keep_alive_s"),
    "stop_s",
)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("host", ["", " ", None, 5, ["a"], "a\0b"]),
        ("port", [-1, 65536, "8000", 80.5, True, None]),
        ("api_key", ["", "  ", 1234, True, ["a"], "a\0b", "-", "@/no/such/file", "https://x.y/key", "/etc/key.txt"]),
        ("model_name", ["", 5, ["a"]]),
        ("split", ["", None, 5, ["a"], "a\0"]),
        ("template", [None, 5, ["enable_thinking"], {1: 2}, {"tokenize": True}]),
        ("cache_dir", ["", 5, ["a"]]),
        *((name, [0, -1, 1.5, "5", None, True]) for name in COUNTS),
        ("warm_up", [None, "true", 1]),
        ("max_waiting", [-1, 0.5, None]),
        *((name, [-1, -0.1, float("nan"), float("inf"), "1", True, [1]]) for name in NUMBERS),
        *((name, [0]) for name in ("device_gib", "body_mib", "body_s", "request_s", "keep_alive_s")),
        *((name, [None]) for name in ("step_every_s", "body_mib", "body_s", "keep_alive_s", "stop_s")),
    ],
)
def test_values_out_of_range_are_named(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(ValueError, match=rf"serve\.{name}") as caught:
            ServeConfig(**{name: value})
        assert "task." not in str(caught.value)


def test_ends_of_ranges(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("secret\n")
    ServeConfig(
        port=0,
        api_key=f"@{tmp_path / 'key'}",
        split="---",
        template={"enable_thinking": False},
        min_document=1,
        max_waiting=0,
        step_every_s=0,
        device_gib=0.5,
        host_gib=0,
        disk_gib=0,
        request_s=None,
        stop_s=0,
        cache_dir="~/documents",
    )
    ServeConfig(port=65535, device_gib=None, host_gib=None, disk_gib=None, api_key="@@secret")


@pytest.mark.parametrize(
    ("host", "is_local"),
    [
        ("127.0.0.1", True),
        ("127.0.0.5", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("example.org", False),
        ("10.0.0.1", False),
    ],
)
def test_open_host_without_key_is_warned_of(host: str, is_local: bool, caplog: pytest.LogCaptureFixture) -> None:
    assert is_loopback(host) == is_local
    with caplog.at_level(logging.WARNING):
        ServeConfig(host=host, api_key="secret")
        assert not caplog.records
        ServeConfig(host=host)
    assert ("serve.api_key" in caplog.text) != is_local
    assert "secret" not in caplog.text


def composed(*overrides: str) -> ServeConfig:
    """Return the settings of a command line."""
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        config = compose("serve", [readable(one, in_sweep=False) for one in overrides])
    values: Any = OmegaConf.to_container(config, resolve=True)
    return read_serve_settings(values).serve


def test_config_file_holds_the_defaults() -> None:
    assert composed() == ServeConfig(request_s=600)


def test_overrides_reach_the_settings() -> None:
    found = composed(
        "serve.port=0", "serve.request_s=null", "serve.host_gib=0", "+serve.template.enable_thinking=false"
    )
    assert (found.port, found.request_s, found.host_gib) == (0, None, 0)
    assert found.template == {"enable_thinking": False}


def test_texts_are_taken_as_they_are_typed() -> None:
    found = composed("serve.api_key=1234", "serve.split=\\n---\\n", "serve.model_name=7", "serve.cache_dir=/tmp/x")
    assert (found.api_key, found.split, found.model_name) == ("1234", "\n---\n", "7")


def test_unknown_setting_is_named() -> None:
    with pytest.raises(ValueError, match="'max_sequences'"):
        composed("+serve.max_sequence=5")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("api_key", "give a text or @FILE, or null"),
        ("cache_dir", "give a folder"),
        ("host", "give a name or an address"),
    ],
)
def test_empty_texts_are_told_what_is_accepted(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as raised:
        ServeConfig(**{name: ""})
    assert "standard input" not in str(raised.value)


# --- what only the first rank checks ---------------------------------------------------------------------------------


TOKENIZER = byte_tokenizer()


def opened(config: ServeConfig, tokenizer: Any = TOKENIZER) -> str:
    """Return why the server cannot be opened, as all ranks hear it."""
    model = SimpleNamespace(loaded=SimpleNamespace(tokenizer=tokenizer, source="tiny"))
    arguments: Any = (None, model, "tiny", config, None, 0, None, None)
    return failure_of(lambda: run._open(*arguments))


def failure_of(work: Any) -> str:
    """Return why work of the first rank fails, as all ranks hear it."""
    group: Any = SimpleNamespace(is_first=True, world_size=2, gather_objects=lambda one: [one, (None, None)])
    with pytest.raises(JobError) as caught:
        Steps(group).from_first(work)
    return str(caught.value)


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "prometheus_client", "pydantic"])
def test_missing_packages(package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = [name for name in sys.modules if name.startswith("apb_ds.serving.")]
    for name in ours:
        if name.rpartition(".")[2] in ("app", "metrics", "service", "protocol"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    said = failure_of(lambda: run._bind(ServeConfig()))
    assert f"{package}; install the extra [serve]" in said and "pip install '.[serve]'" in said


def test_the_packages_are_needed_by_the_first_rank_alone() -> None:
    packages = ("fastapi", "uvicorn", "prometheus_client")  # DeepSpeed needs pydantic
    blocked = f"import sys; sys.modules.update(dict.fromkeys({packages!r}))"
    done = subprocess.run(
        [sys.executable, "-c", f"{blocked}; import apb_ds.serving.run"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_template_arguments_that_the_template_does_not_read() -> None:
    said = opened(ServeConfig(template={"enable_thinking": False}))
    assert "serve.template.enable_thinking has no effect" in said and "task." not in said


def test_template_arguments_without_a_template() -> None:
    said = opened(ServeConfig(template={"enable_thinking": False}), byte_tokenizer(template=None))
    assert "serve.template" in said and "needs a chat template" in said


def test_model_without_a_tokenizer() -> None:
    assert "model.tokenizer" in opened(ServeConfig(), None)


def test_the_folder_of_documents_is_its_owners(tmp_path: Path) -> None:
    made, known = tmp_path / "new" / "apb_ds-tiny", tmp_path / "apb_ds-tiny"
    known.mkdir(mode=0o755)
    for folder in (made, known):
        run.make_folder(folder)
    assert [folder.stat().st_mode & 0o777 for folder in (made, known)] == [0o700, 0o755]


def test_folders_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    folder = tmp_path / "file" / "apb_ds-tiny"
    assert f"serve.cache_dir={tmp_path / 'file'}: " in failure_of(lambda: run.make_folder(folder))
    (tmp_path / "lock").mkdir()
    none: Any = None
    assert f"serve.cache_dir={tmp_path.parent}: " in failure_of(lambda: run.take_over(tmp_path, none, none))
