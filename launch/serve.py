"""Serve OpenAI's API with a cache of documents: ``deepspeed launch/serve.py``, ``python`` or ``apb-serve``.

configs/serve.yaml and its groups hold every setting. Ctrl-C or SIGTERM ends it.
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


class Server(common.Jobs):
    """The one job of a command line that serves."""

    def run(self, config: DictConfig) -> None:
        from apb_ds.session.steps import JOB_ERRORS, JobError

        job = common.job_of(config)
        if job.in_sweep:
            raise SystemExit(common.say_once("launch/serve.py runs one server; leave out -m."))
        try:
            from apb_ds.serving.run import serve

            serve(job.values, self.watch, lambda line: print(line, flush=True))
        except (JobError, *JOB_ERRORS) as error:
            if isinstance(error, JOB_ERRORS) and not isinstance(error, ValueError):
                raise  # perhaps on this rank only: it ends, and the launcher ends the others
            self.has_failed = True
            if common.rank() == 0:
                print(f"Error: {error}", file=sys.stderr, flush=True)


def main() -> int:
    return common.run_hydra("serve", Server())


if __name__ == "__main__":
    sys.exit(main())
