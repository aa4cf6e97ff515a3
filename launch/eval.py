"""Score a method on a task: ``deepspeed launch/eval.py task=passkey_grid method=apb`` or ``apb-eval``.

configs/eval.yaml and its groups hold every setting; ``-m`` with comma-separated values compares settings.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __spec__ is None:  # started as a file of a checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from launch import common
    from launch.infer import Inference
else:
    from . import common
    from .infer import Inference


def main() -> int:
    return common.run_hydra("eval", Inference())


if __name__ == "__main__":
    sys.exit(main())
