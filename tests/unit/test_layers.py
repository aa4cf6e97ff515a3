"""The order of the layers: a module imports only from its own layer and those before it."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "apb_ds"
LAYERS = (
    "utils",
    "config",
    "plan",
    "ops",
    "compressors",
    "parallel",
    "cache",
    "suffixes",
    "methods",
    "attention",
    "hf",
    "weights",
    "loading",
    "engine",
    "tasks",
    "report",
    "session",
    "serving",
    "training",
    "bench",
    "__main__",
)
# Who may import what: everywhere else these are violations.
ONLY_IN = {"deepspeed.comm": ("parallel",)}
NEVER_IN = dict.fromkeys(("utils", "config", "plan"), ("torch", "transformers", "deepspeed"))
HEAVY = ("torch", "transformers", "deepspeed", "fastapi", "pydantic", "uvicorn", "prometheus_client")


def is_within(module: str, parent: str) -> bool:
    """Whether `module` is `parent` or lies in it."""
    return module == parent or module.startswith(parent + ".")


def module_package(path: Path, root: Path) -> list[str]:
    """Name parts of the package that holds the module at `path`, for relative imports."""
    return list(path.relative_to(root).parent.parts)


def called_name(node: ast.Call) -> str:
    """Last part of the name of what is called: ``import_module`` for ``importlib.import_module(...)``."""
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else ""


def imported_modules(path: Path, root: Path) -> Iterator[tuple[int, str]]:
    """Yield (line, module) of every import in the file, inside functions and ``TYPE_CHECKING`` too.

    ``from a import b`` yields ``a.b``, since b may be a module. A constant name given to ``import_module`` or
    ``__import__`` counts, and so does reaching ``deepspeed.comm`` through an attribute.
    """
    package = module_package(path, root)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), filename=str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{source}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and called_name(node) in ("import_module", "__import__"):
            for argument in node.args:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield node.lineno, argument.value
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == "deepspeed.comm":
            yield node.lineno, "deepspeed.comm"


def layer_of(path: Path, root: Path) -> str:
    """Layer of the file at ``root/apb_ds/<layer>[.py]/...``."""
    return path.relative_to(root / PACKAGE).parts[0].removesuffix(".py")


def check_import(layer: str, module: str) -> str | None:
    """Return what is wrong with importing `module` from `layer`, or None."""
    if is_within(module, "launch") or is_within(module, f"{PACKAGE}.launch"):
        return "nothing imports launch/"
    for library, layers in ONLY_IN.items():
        if is_within(module, library) and layer not in layers:
            return f"{library} is imported only in {', '.join(layers)}"
    for library in NEVER_IN.get(layer, ()):
        if is_within(module, library):
            return f"{layer} does not import {library}"
    if not is_within(module, PACKAGE):
        return None
    parts = module.split(".")
    target = parts[1] if len(parts) > 1 else PACKAGE
    if target == "__version__":
        return None
    if target == PACKAGE:
        return "import __version__ from it, or a name from its own module"
    if target not in LAYERS:
        return f"{target!r} is no layer: import a name from its own module, or give the module a place in LAYERS"
    if LAYERS.index(target) > LAYERS.index(layer):
        return f"{layer} comes before {target} and may not import it"
    return None


def violations(root: Path) -> list[str]:
    """Return every forbidden import below ``root/apb_ds``, and every import of launch/ in ``root/examples``."""
    found = []
    for path in sorted((root / PACKAGE).rglob("*.py")):
        name = path.relative_to(root)
        if path == root / PACKAGE / "__init__.py":  # lazy: it names modules of every layer and imports them on use
            continue
        layer = layer_of(path, root)
        if layer not in LAYERS:
            found.append(f"{name}: layer {layer!r} has no place in the order; add it to LAYERS")
            continue
        for line, module in imported_modules(path, root):
            problem = check_import(layer, module)
            if problem:
                found.append(f"{name}:{line}: imports {module}: {problem}")
    for path in sorted((root / "examples").rglob("*.py")):
        for line, module in imported_modules(path, root):
            if is_within(module, "launch") or is_within(module, f"{PACKAGE}.launch"):
                found.append(f"{path.relative_to(root)}:{line}: imports {module}: nothing imports launch/")
    return found


def test_no_module_imports_upward() -> None:
    found = violations(ROOT)
    assert not found, "\n" + "\n".join(found)


def test_every_folder_of_modules_is_a_package() -> None:
    folders = {path.parent for path in (ROOT / PACKAGE).rglob("*.py")}
    missing = [str(folder.relative_to(ROOT)) for folder in sorted(folders) if not (folder / "__init__.py").exists()]
    assert not missing, f"no __init__.py, so not part of the built package: {', '.join(missing)}"


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("plan.py", "from apb_ds.engine.engine import APBEngine", "plan comes before engine"),
        ("plan.py", "import torch", "plan does not import torch"),
        ("ops/merge.py", "def f():\n    from ..cache import ShardedCache", "ops comes before cache"),
        ("ops/merge.py", "from .. import hf", "ops comes before hf"),
        ("ops/kernels/x.py", "import importlib\nimportlib.import_module('apb_ds.hf')", "ops comes before hf"),
        (
            "methods/apb.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import apb_ds.hf",
            "before hf",
        ),
        (
            "engine/engine.py",
            "from apb_ds import APBConfig",
            "'APBConfig' is no layer: import a name from its own module",
        ),
        ("engine/x.py", "import apb_ds", "import __version__ from it, or a name from its own module"),
        ("session.py", "from apb_ds.launch.infer import main", "nothing imports launch/"),
        ("plan.py", "from .launch import common", "nothing imports launch/"),
        ("session.py", "from launch.infer import main", "nothing imports launch/"),
        ("engine/x.py", "import deepspeed.comm as dist", "deepspeed.comm is imported only in parallel"),
        ("engine/x.py", "from deepspeed import comm", "deepspeed.comm is imported only in parallel"),
        (
            "engine/engine.py",
            "from importlib import import_module\nimport_module('deepspeed.comm')",
            "only in parallel",
        ),
        (
            "engine/engine.py",
            "import deepspeed\ndeepspeed.comm.barrier()",
            "deepspeed.comm is imported only in parallel",
        ),
        ("helpers.py", "", "'helpers' has no place in the order"),
        ("../examples/attach.py", "import launch", "nothing imports launch/"),
    ],
)
def test_check_catches_violation(tmp_path: Path, file: str, source: str, complaint: str) -> None:
    path = tmp_path / PACKAGE / file
    (tmp_path / PACKAGE).mkdir()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source, encoding="utf-8")
    found = violations(tmp_path)
    assert len(found) == 1, found
    assert complaint in found[0]


def test_check_accepts_downward_imports(tmp_path: Path) -> None:
    (tmp_path / PACKAGE / "parallel").mkdir(parents=True)
    (tmp_path / PACKAGE / "engine").mkdir()
    (tmp_path / PACKAGE / "parallel" / "groups.py").write_text("import deepspeed.comm\nfrom ..plan import Plan\n")
    (tmp_path / PACKAGE / "engine" / "x.py").write_text(
        "from apb_ds.parallel.groups import x\nimport torch\nimport deepspeed\n"
    )
    (tmp_path / PACKAGE / "__init__.py").write_text("from apb_ds.engine.engine import y\n")
    assert violations(tmp_path) == []


def test_importing_the_package_is_silent_and_light() -> None:
    script = f"import sys, apb_ds; print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert done.stderr == "[]\n"
