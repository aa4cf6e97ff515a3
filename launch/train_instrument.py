"""Train a small model to solve RULER: ``deepspeed launch/train_instrument.py +exp=smollm2_ruler``.

configs/train_instrument.yaml holds every setting. To continue a stopped run, repeat the command.
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
    from apb_ds.training.instrument import train_instrument

    return train_instrument(job.values, watch)


def summarise(record: dict[str, Any]) -> str:
    output = record["settings"]["train"]["output"]
    return f"Adapter: {output}/adapter (loss {record['last_loss']}, {record['seconds']} s)"


def main() -> int:
    return common.run_hydra("train_instrument", common.Trainings(train, summarise))


if __name__ == "__main__":
    sys.exit(main())
