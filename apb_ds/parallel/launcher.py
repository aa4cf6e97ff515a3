"""What the launcher (deepspeed, torchrun) says in the environment. Imports no torch."""

from __future__ import annotations

import os


def launched_world_size() -> int:
    """Return how many ranks the launcher started; 1 without a launcher."""
    started = all(os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
    return int(os.environ["WORLD_SIZE"]) if started else 1


def launched_rank() -> int:
    """Return the global rank that the launcher gave this process; 0 without a launcher."""
    return int(os.environ["RANK"]) if launched_world_size() > 1 else 0


def ranks_on_node() -> int:
    """Return how many ranks the launcher started on this node; 1 without a launcher."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))  # torchrun's name, deepspeed's
