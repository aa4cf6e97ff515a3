"""Score a method on a task: ``deepspeed launch/eval.py task=passkey_grid method=apb``.

Everything is configured by configs/eval.yaml and its groups; ``-m`` with comma-separated values compares settings.
"""

from __future__ import annotations

import sys

import common
import infer

if __name__ == "__main__":
    evaluation = infer.Inference()
    sys.exit(common.run_hydra("eval", evaluation.run, evaluation.finish, evaluation.bad_job, evaluation.abandon))
