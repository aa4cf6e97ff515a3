"""Answer a question about a long document: ``deepspeed launch/infer.py``, ``torchrun``, ``python`` or ``apb-infer``.

configs/infer.yaml and its groups hold every setting; ``-m`` with comma-separated values runs a sweep.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if __spec__ is None:  # started as a file of a checkout
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from launch import common, objective
else:
    from . import common, objective

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from apb_ds.session import Job, Session


class Inference(common.Jobs):
    """Jobs that share one session, which the first of them starts."""

    def __init__(self, session: Session | None = None) -> None:
        super().__init__()
        self.session = session
        self._running: Job | None = None

    def run(self, config: DictConfig) -> float | tuple[float, ...] | None:
        job = self._running = common.job_of(config)
        record = self._started().run(job)
        self._running = None
        if not job.in_sweep:
            return None
        self._say(job, record)
        return self._objective(job, record)

    def bad_job(self, job: Job, why: str) -> None:
        """Record the failure; the sweep goes on."""
        self._say(job, self._started().fail(job, why))

    def abandon(self, why: str) -> None:
        if self.session is not None:
            self.session.abandon(why)
            if self._running is not None and self._running.in_sweep and self.session.records:
                self._say(self._running, self.session.records[-1])
            self._keep_sweep(self.session)

    def finish(self) -> bool:
        """Close the session and keep what closes a sweep; return whether all jobs succeeded."""
        if self.session is None:
            return True
        self.session.close()
        return self._keep_sweep(self.session) and not self.session.has_failed

    def _started(self) -> Session:
        from apb_ds.session import Session

        if self.session is None:
            self.session = Session(watch=self.watch)
        return self.session

    def _say(self, job: Job, record: dict[str, Any]) -> None:
        from apb_ds.report.sweep import job_line

        if common.rank() > 0 or self.session is None:
            return
        swept = common.swept_keys()
        asked = {name: value for name, value in job.overrides.items() if name in swept}
        where = None if job.run_dir is None else job.run_dir / "record.json"
        print(job_line(len(self.session.records) - 1, asked, record, where), flush=True)

    def _objective(self, job: Job, record: dict[str, Any]) -> float | tuple[float, ...] | None:
        """Return the first rank's numbers on every rank: sweepers must all ask for the same next job."""
        try:
            value = objective.objective_of(record, job.values.get("objective"))
        except ValueError as error:  # the same on every rank
            raise SystemExit(common.say_once(str(error))) from None
        group = None if self.session is None else self.session.group
        return value if group is None or value is None else group.gather_objects(value)[0]

    def _keep_sweep(self, session: Session) -> bool:
        """Write a sweep's table into its folder, on the first rank; return whether that went well."""
        from apb_ds.report.sweep import write_sweep

        directory = common.sweep_directory()
        if common.rank() > 0 or directory is None or not session.records:
            return True
        try:
            written = write_sweep(directory, session.records, session.comparisons)
        except OSError as error:
            print(f"Error: cannot write {directory} ({error.strerror or error}).", file=sys.stderr, flush=True)
            return False
        print(f"Sweep: {', '.join(str(path) for path in written)}", flush=True)
        return True


def main() -> int:
    return common.run_hydra("infer", Inference())


if __name__ == "__main__":
    sys.exit(main())
