"""Sequence-parallel attention methods: how blocks are attended to at prefill, and new tokens afterwards."""
