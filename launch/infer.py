"""Answer a question about a long document: ``deepspeed launch/infer.py``, ``torchrun ... launch/infer.py`` or python.

Everything is configured by configs/infer.yaml and its groups; ``-m`` with comma-separated values runs a sweep.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import common

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from apb_ds.session import Session


class Inference:
    """The session that all jobs of a run share, made when the first one starts."""

    def __init__(self) -> None:
        self.session: Session | None = None

    def run(self, config: DictConfig) -> None:
        from apb_ds.session import Job, Session

        if self.session is None:
            self.session = Session()
        values, run_dir, overrides = common.job_of(config)
        self.session.run(Job(values, run_dir, overrides))

    def finish(self) -> bool:
        """Close the session; return whether all jobs went well."""
        if self.session is None:
            return True
        self.session.close()
        return not self.session.has_failed


if __name__ == "__main__":
    inference = Inference()
    sys.exit(common.run_hydra("infer", inference.run, inference.finish))
