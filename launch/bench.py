"""Measure prefill, APB against dense: ``python launch/bench.py``. Writes bench.json beside the table that it prints."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import common

if TYPE_CHECKING:
    from omegaconf import DictConfig


class Benchmark:
    """The jobs of a benchmark, and whether all went well."""

    def __init__(self) -> None:
        self.has_failed = False

    def run(self, config: DictConfig) -> None:
        from apb_ds.bench import run_bench
        from apb_ds.report.record import write_json
        from apb_ds.report.table import bench_table, make_console

        job = common.job_of(config)
        try:
            record, group = run_bench(job.values)
        except ValueError as error:
            self.has_failed = True
            if common.rank() == 0:
                print(f"Error: {error}", file=sys.stderr, flush=True)
            return
        if group.is_first and job.run_dir is not None:
            write_json(job.run_dir / "bench.json", record)
            make_console().print(bench_table(record))
            print(f"Record: {job.run_dir / 'bench.json'}", flush=True)

    def finish(self) -> bool:
        """Leave the group; return whether all jobs went well."""
        import torch

        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        return not self.has_failed


if __name__ == "__main__":
    benchmark = Benchmark()
    sys.exit(common.run_hydra("bench", benchmark.run, benchmark.finish))
