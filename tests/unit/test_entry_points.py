"""The commands: setup.cfg, launch/, configs/ and ``python -m apb_ds`` name the same ones; all take the same flags."""

from __future__ import annotations

import configparser
import importlib
import os
import runpy
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
from hydra._internal.utils import get_args_parser

import apb_ds
from apb_ds.__main__ import COMMANDS
from launch.arguments import FLAGS, for_hydra

ROOT = Path(__file__).resolve().parents[2]


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def listed(section: str, option: str) -> dict[str, str]:
    """Return the lines ``name = value`` of an option."""
    lines = setup_cfg()[section][option].strip().splitlines()
    return dict(tuple(part.strip() for part in line.split("=", 1)) for line in lines)


SCRIPTS = listed("options.entry_points", "console_scripts")
MODULES = sorted(target.removeprefix("apb_ds.launch.").removesuffix(":main") for target in SCRIPTS.values())


def run(*arguments: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | environment
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=variables, capture_output=True, text=True, timeout=60, check=False
    )


def test_each_primary_config_has_a_command() -> None:
    expected = {f"apb-{name.replace('_', '-')}": f"apb_ds.launch.{name}:main" for name in MODULES}
    assert expected == SCRIPTS
    assert sorted(file.stem for file in (ROOT / "configs").glob("*.yaml")) == MODULES


def test_the_package_lists_its_commands() -> None:
    assert set(COMMANDS) == set(SCRIPTS)


def test_every_folder_of_the_package_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    setuptools = pytest.importorskip("setuptools")
    monkeypatch.chdir(ROOT)
    with mock.patch.object(setuptools, "setup") as setup:
        runpy.run_path("setup.py")
    packages = set(setup.call_args.kwargs["packages"])
    folders = {".".join(file.parent.relative_to(ROOT).parts) for file in (ROOT / "apb_ds").rglob("*.py")}
    mapped = listed("options", "package_dir")
    assert packages == folders | set(mapped) | {"hydra_plugins"}
    for folder in mapped.values():
        assert (ROOT / folder / "__init__.py").exists(), "an editable installation finds no package without it"


@pytest.mark.parametrize("name", MODULES)
def test_version_of_a_command(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", [name, "method.hosts=2", "--version"])
    assert importlib.import_module(f"launch.{name}").main() == 0
    assert capsys.readouterr().out == f"apb_ds {apb_ds.__version__}\n"


def test_version_of_the_package() -> None:
    done = run("-m", "apb_ds", "--version")
    assert (done.returncode, done.stdout) == (0, f"apb_ds {apb_ds.__version__}\n"), done.stderr


@pytest.mark.parametrize("name", MODULES)
def test_a_file_of_a_checkout_runs_from_elsewhere(name: str, tmp_path: Path) -> None:
    done = run(str(ROOT / "launch" / f"{name}.py"), "--cfg", "hydra", "--package", "hydra.runtime", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"path: {ROOT / 'configs'}\n" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_config_directory_adds_experiments(tmp_path: Path) -> None:
    (tmp_path / "exp").mkdir()
    (tmp_path / "exp" / "mine.yaml").write_text("# @package _global_\nmethod:\n  hosts: 6\n")
    for arguments in (
        ("--config-dir", str(tmp_path), "+exp=mine", "method.kernel=reference"),
        ("+exp=mine", f"--config-dir={tmp_path}", "method.kernel=reference"),
    ):
        done = run("launch/infer.py", *arguments, "--cfg", "job", "--package", "method")
        assert done.returncode == 0, done.stderr
        assert "hosts: 6\n" in done.stdout and "kernel: reference\n" in done.stdout
    done = run("launch/infer.py", "--config-dir", str(tmp_path), "+exp=mime")
    assert done.returncode == 2 and "exp=mime" in done.stderr and "Did you mean 'mine'?" in done.stderr


def test_tab_completion() -> None:
    done = run("launch/infer.py", "-sc", "query=bash", COMP_LINE="python launch/infer.py method=d")
    assert (done.returncode, done.stdout) == (0, "method=dense\n"), done.stderr
    done = run("launch/train_heads.py", "-sc", "query=bash", COMP_LINE="python launch/train_heads.py train.hid")
    assert (done.returncode, done.stdout) == (0, "train.hidden_size=\n"), done.stderr


def test_bad_settings_of_a_method_are_refused_before_heavy_imports(tmp_path: Path) -> None:
    code = (
        "import sys; from launch.infer import main; code = main(); "
        "sys.exit('imported' if {'torch', 'deepspeed', 'transformers'} & set(sys.modules) else code)"
    )
    done = run("-c", code, "method.hosts=0", f"hydra.run.dir={tmp_path}/run")
    assert (done.returncode, done.stderr) == (2, "Error: method.hosts=0 must be an integer of at least 1.\n")
    assert list(tmp_path.iterdir()) == []


def test_what_deepspeed_logs_is_shown_for_debugging_only(tmp_path: Path) -> None:
    said = []
    for debug in ("false", "true"):
        done = run("launch/infer.py", f"debug={debug}", "model.path=no/such", f"hydra.run.dir={tmp_path}/{debug}")
        said.append([line for line in (done.stdout + done.stderr).splitlines() if "get_accelerator" in line])
    assert said[0] == [] and said[1] != []


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a=1 -m b=2,3", "-m a=1 b=2,3"),
        ("--local_rank=1 a=1 --config-dir D b=2", "--config-dir D a=1 b=2"),
        ("a=1 -cd D --multirun b=2", "-cd D --multirun a=1 b=2"),
        ("a=1 --config-dir=D --info", "--config-dir=D a=1 --info"),
        ("a=1 --config-dir", "a=1 --config-dir"),
    ],
)
def test_flags_come_first(given: str, expected: str) -> None:
    assert for_hydra(given.split()) == expected.split()


def test_the_flags_are_hydras() -> None:
    assert sorted(FLAGS) == sorted(get_args_parser()._option_string_actions)
