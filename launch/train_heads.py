"""Train retaining heads for a model: ``deepspeed launch/train_heads.py +exp=smollm2_heads``.

Everything is configured by configs/train_heads.yaml. A run that was stopped goes on with the same command.
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
        from apb_ds.training.heads.train import train_heads

        job = common.job_of(config)
        record = common.train(lambda: train_heads(job.values, common.task_arguments()))
        if record is None:
            self.has_failed = True
        elif common.rank() == 0:
            last = record["curve"][-1]
            output = record["settings"]["train"]["output"]
            print(
                f"Heads: {output}/heads (held out: loss {last['loss']}, overlap {last['overlap']}, attention mass "
                f"{last['mass']}, at random {last['mass_random']}; {record['seconds']} s)",
                flush=True,
            )

    def finish(self) -> bool:
        """Leave the group; return whether all jobs went well."""
        common.leave_training_group()
        return not self.has_failed


if __name__ == "__main__":
    training = Training()
    sys.exit(common.run_hydra("train_heads", training.run, training.finish))
