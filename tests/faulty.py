"""A launch script with an injected fault: ``deepspeed tests/faulty.py infer.py ...``.

The environment variable `VARIABLE` holds the `Fault` as JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
VARIABLE = "APB_TEST_FAULT"


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and when.

    Attributes
    ----------
    kind : "kill" (SIGKILL), "hang", "memory" (runs out), "raise" (in the compressor), "link" (goes down; needs root),
        "fill" (the disk of a folder)
    rank : the rank that fails
    phase, layer : when it enters this attention; "raise" happens in prefill's compressor instead
    times : at which time, from 1
    compressor : only with this compressor
    moment : a file that gets the time of the fault, in seconds since the epoch
    folder : for "fill"
    """

    kind: str
    rank: int
    phase: str = "prefill"
    layer: int = 1
    times: int = 1
    compressor: str = ""
    moment: str = ""
    folder: str = ""

    def as_variable(self) -> dict[str, str]:
        return {VARIABLE: json.dumps(asdict(self))}

    @classmethod
    def from_environment(cls) -> Fault | None:
        text = os.environ.get(VARIABLE)
        return cls(**json.loads(text)) if text else None


def install(fault: Fault) -> None:
    """Inject the fault, if this process is the rank that fails."""
    if int(os.environ.get("RANK", "0")) != fault.rank:
        return
    if fault.kind == "raise":
        from apb_ds.compressors import base

        mock.patch.object(base.Compressor, "compress", lambda *_: _happen(fault)).start()
        return
    from apb_ds.attention import APBAttention

    forward = APBAttention.forward
    entered: list[bool] = []

    def faulty_forward(self: Any, *arguments: Any, **options: Any) -> Any:
        is_here = options["phase"].value == fault.phase and options["layer_idx"] == fault.layer
        is_here = is_here and fault.compressor in ("", self.config.compressor)
        if is_here:
            entered.append(True)
        if is_here and len(entered) == fault.times:
            state = options.get("state")
            rounds = (None, None) if state is None else (state.round_index, len(state.plan.rounds))
            self.group.progress.enter_layer(fault.phase, fault.layer, *rounds)
            _happen(fault)
        return forward(self, *arguments, **options)

    mock.patch.object(APBAttention, "forward", faulty_forward).start()


def _happen(fault: Fault) -> None:
    if fault.moment:
        Path(fault.moment).write_text(str(time.time()))
    if fault.kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.kind == "hang":
        time.sleep(3600)
    elif fault.kind == "memory":
        import torch

        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    elif fault.kind == "raise":
        raise ZeroDivisionError("a compressor that divides by zero")
    elif fault.kind == "link":
        subprocess.run(["ip", "link", "set", "eth0", "down"], check=False)
    elif fault.kind == "fill":
        with contextlib.suppress(OSError), open(Path(fault.folder) / "filler", "wb", buffering=0) as filler:
            while True:
                filler.write(b"-" * 4096)


def run_script(name: str, arguments: list[str]) -> None:
    """Run launch/<name> as the main module."""
    fault = Fault.from_environment()
    sys.path[:0] = [str(ROOT), str(ROOT / "launch")]
    sys.argv = [name, *arguments]
    if fault is not None:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
        install(fault)
    runpy.run_path(str(ROOT / "launch" / name), run_name="__main__")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    given = [argument for argument in sys.argv[1:] if not argument.startswith("--local_rank")]
    run_script(given[0], given[1:])
