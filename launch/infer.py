"""Answer a question about a long document: ``deepspeed launch/infer.py``, ``torchrun``, ``python`` or ``apb-infer``.

configs/infer.yaml and its groups hold every setting; ``-m`` with comma-separated values runs a sweep.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if __spec__ is None:  # started as a file of a checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from launch import common
else:
    from . import common

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from apb_ds.session import Job, Session


class Inference(common.Jobs):
    """Jobs that share one session, which the first of them starts."""

    def __init__(self, session: Session | None = None) -> None:
        super().__init__()
        self.session = session

    def run(self, config: DictConfig) -> None:
        self._started().run(common.job_of(config))

    def bad_job(self, job: Job, why: str) -> None:
        """Record the failure; the sweep goes on."""
        self._started().fail(job, why)

    def abandon(self, why: str) -> None:
        if self.session is not None:
            self.session.abandon(why)

    def finish(self) -> bool:
        """Close the session; return whether all jobs succeeded."""
        if self.session is None:
            return True
        self.session.close()
        return not self.session.has_failed

    def _started(self) -> Session:
        from apb_ds.session import Session

        if self.session is None:
            self.session = Session()
        return self.session


def main() -> int:
    return common.run_hydra("infer", Inference())


if __name__ == "__main__":
    sys.exit(main())
