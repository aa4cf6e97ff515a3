"""Train an evaluation instrument: ``deepspeed launch/train_instrument.py +exp=smollm2_ruler``.

Everything is configured by configs/train_instrument.yaml. A run that was stopped goes on with the same command.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import common

if TYPE_CHECKING:
    from omegaconf import DictConfig


class Training:
    """The jobs of a run, and whether all went well."""

    def __init__(self) -> None:
        self.has_failed = False

    def run(self, config: DictConfig) -> None:
        from apb_ds.training.instrument import train_instrument

        job = common.job_of(config)
        record = common.train(lambda: train_instrument(job.values))
        if record is None:
            self.has_failed = True
        elif common.rank() == 0:
            output = record["settings"]["train"]["output"]
            print(f"Adapter: {output}/adapter (loss {record['last_loss']}, {record['seconds']} s)", flush=True)

    def finish(self) -> bool:
        """Leave the group; return whether all jobs went well."""
        common.leave_training_group()
        return not self.has_failed


if __name__ == "__main__":
    training = Training()
    sys.exit(common.run_hydra("train_instrument", training.run, training.finish))
