"""Answer a question about a long document: ``deepspeed launch/infer.py``, ``torchrun ... launch/infer.py`` or python.

Everything is configured by configs/infer.yaml and its groups; ``-m`` with comma-separated values runs a sweep.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import common

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from apb_ds.session import Job, Session


class Inference:
    """The session that all jobs of a run share, made when the first one starts."""

    def __init__(self, session: Session | None = None) -> None:
        self.session = session

    def run(self, config: DictConfig) -> None:
        self._started().run(common.job_of(config))

    def bad_job(self, job: Job, why: str) -> None:
        """Count a job of a sweep that cannot be run."""
        self._started().fail(job, why)

    def abandon(self, why: str) -> None:
        """Keep what this rank has, where it cannot go on; sends nothing."""
        if self.session is not None:
            self.session.abandon(why)

    def finish(self) -> bool:
        """Close the session; return whether all jobs went well."""
        if self.session is None:
            return True
        self.session.close()
        return not self.session.has_failed

    def _started(self) -> Session:
        from apb_ds.session import Session

        if self.session is None:
            self.session = Session()
        return self.session


if __name__ == "__main__":
    inference = Inference()
    sys.exit(common.run_hydra("infer", inference.run, inference.finish, inference.bad_job, inference.abandon))
