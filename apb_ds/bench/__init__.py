"""Benchmarks of methods over lengths, hosts and kernels: prefill, first token, decoding, memory and traffic."""

from apb_ds.bench.config import BenchConfig
from apb_ds.bench.run import run_bench

__all__ = ["BenchConfig", "run_bench"]
