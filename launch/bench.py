"""Measure methods over lengths, hosts and kernels: ``python launch/bench.py``, or under a launcher.

Writes bench.json as it goes, so that a benchmark that is stopped keeps what it has measured, and at the end figures
where matplotlib is installed, beside the table that it prints.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import common

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from apb_ds.session import Job


class Benchmark:
    """The jobs of a benchmark, and whether all went well."""

    def __init__(self) -> None:
        self.has_failed = False

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
            record, group = run_bench(job.values, keep)
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
        """Say what is wrong with a job; those of a sweep that follow are run."""
        self.has_failed = True
        if common.rank() == 0:
            print(f"Error: {why}", file=sys.stderr, flush=True)

    def finish(self) -> bool:
        """Leave the group; return whether all jobs went well."""
        import torch

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        return not self.has_failed


if __name__ == "__main__":
    benchmark = Benchmark()
    sys.exit(common.run_hydra("bench", benchmark.run, benchmark.finish, benchmark.bad_job))
