"""Tensor operations with no state: attention kernels that return the log-sum-exp, merging, selection."""
