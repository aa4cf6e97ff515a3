"""How tests start the deepspeed launcher."""

from __future__ import annotations

import shutil
import socket
import sys
from pathlib import Path

import pytest


def deepspeed_command(num_ranks: int = 2) -> list[str]:
    """Return the launcher of this environment with its options, on a port that is free; skip where there is none."""
    beside = Path(sys.executable).with_name("deepspeed")
    launcher = str(beside) if beside.exists() else shutil.which("deepspeed")
    if launcher is None:
        pytest.skip("missing: the deepspeed launcher")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return [launcher, "--num_accelerators", str(num_ranks), "--master_port", str(port)]
