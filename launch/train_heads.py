"""Train retaining heads for a model: ``deepspeed launch/train_heads.py +exp=smollm2_heads`` or ``apb-train-heads``.

configs/train_heads.yaml holds every setting. To continue a stopped run, repeat the command.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __spec__ is None:  # started as a file of a checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from launch import common
else:
    from . import common

if TYPE_CHECKING:
    from apb_ds.parallel.failure.ending import Watch
    from apb_ds.session import Job


def train(job: Job, watch: Watch) -> dict[str, Any]:
    from apb_ds.training.heads.train import train_heads

    return train_heads(job.values, common.task_arguments(), watch)


def summarise(record: dict[str, Any]) -> str:
    last = record["curve"][-1]
    return (
        f"Heads: {record['settings']['train']['output']}/heads (held out: loss {last['loss']}, overlap "
        f"{last['overlap']}, attention mass {last['mass']}, at random {last['mass_random']}; "
        f"{record['seconds']} s)"
    )


def main() -> int:
    return common.run_hydra("train_heads", common.Trainings(train, summarise))


if __name__ == "__main__":
    sys.exit(main())
