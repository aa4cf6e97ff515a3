"""Shared by the fault tests: they write their measurements to the file that `--fault-times` names."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_checkpoint import save_checkpoint


@dataclass
class FaultTimes:
    """Rows of the table in docs/reliability.md."""

    rows: list[dict[str, Any]] = field(default_factory=list)

    def add(self, fault: str, seconds: list[float], *, timeout_s: int, says: str, codes: list[int]) -> None:
        """Add a fault: seconds until each other rank or node ended, their exit codes, and one of their messages."""
        self.rows.append(
            {
                "fault": fault,
                "timeout_s": timeout_s,
                "seconds": [round(value, 1) for value in seconds],
                "codes": codes,
                "says": says,
            }
        )


@pytest.fixture(scope="session")
def fault_times(request: pytest.FixtureRequest) -> Iterator[FaultTimes]:
    times = FaultTimes()
    yield times
    path = request.config.getoption("--fault-times")
    if path and times.rows:
        import torch

        from apb_ds.report.record import environment

        file = Path(path)
        rows = {row["fault"]: row for row in json.loads(file.read_text())["rows"]} if file.exists() else {}
        rows |= {row["fault"]: row for row in times.rows}  # a subset of the tests replaces only its rows
        file.write_text(json.dumps({"rows": list(rows.values()), **environment(torch.device("cpu"))}, indent=2) + "\n")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and a document."""
    directory = tmp_path_factory.mktemp("tiny")
    save_checkpoint(directory)
    (directory / "document.txt").write_text("A lamp stands on the pier. It is lit at dusk and put out at dawn. " * 8)
    return directory


@pytest.fixture
def ask(checkpoint: Path) -> list[str]:
    """Arguments of launch/infer.py that ask the tiny model a question."""
    return [
        "task=prompt",
        f"task.document=@{checkpoint / 'document.txt'}",
        "task.query=What?",
        "task.max_new_tokens=6",
        f"model.path={checkpoint}",
        "model.device=cpu",
        "method.hosts=4",
    ]
