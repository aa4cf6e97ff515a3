"""Measure methods over lengths, hosts and kernels: ``python launch/bench.py``, under a launcher, or ``apb-bench``.

Writes bench.json after every case, so that a stopped benchmark keeps its measurements, and prints a table at the end.
Draws figures if matplotlib is installed.
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
    from omegaconf import DictConfig

    from apb_ds.session import Job


class Benchmark(common.Jobs):
    """Benchmarks, one a job."""

    def run(self, config: DictConfig) -> None:
        from apb_ds.bench import run_bench
        from apb_ds.report.bench_figures import draw_bench
        from apb_ds.report.bench_table import bench_tables
        from apb_ds.report.paths import hide_paths
        from apb_ds.report.record import write_json
        from apb_ds.report.table import make_console

        job = common.job_of(config)

        def keep(record: dict[str, Any]) -> None:
            if job.run_dir is not None:
                write_json(job.run_dir / "bench.json", hide_paths(record, job.run_dir))

        try:
            record, group = run_bench(job.values, keep, self.watch)
        except ValueError as error:
            self.bad_job(job, str(error))
            return
        self.has_failed = self.has_failed or any(case["status"] != "ok" for case in record["cases"])
        if group.is_first and job.run_dir is not None:
            keep(record)
            console = make_console()
            for table in bench_tables(record):
                console.print(table)
            for figure in draw_bench(job.run_dir, record):
                print(f"Figure: {figure}", flush=True)
            print(f"Record: {job.run_dir / 'bench.json'}", flush=True)

    def bad_job(self, job: Job, why: str) -> None:
        """Report the job; the sweep goes on."""
        self.has_failed = True
        if common.rank() == 0:
            print(f"Error: {why}", file=sys.stderr, flush=True)


def main() -> int:
    return common.run_hydra("bench", Benchmark())


if __name__ == "__main__":
    sys.exit(main())
