"""A group of one rank, and the environment that a launcher sets."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from apb_ds.parallel import groups
from apb_ds.parallel.groups import SequenceGroup, share_cpu_cores
from apb_ds.parallel.launcher import launched_rank, launched_world_size

LAUNCHER = {"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (*LAUNCHER, "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_one_rank_gathers_from_itself() -> None:
    group = SequenceGroup()
    assert (group.rank, group.world_size, group.is_first, group.is_last) == (0, 1, True, True)
    tensor = torch.arange(6).reshape(2, 3)
    assert torch.equal(group.all_gather(tensor), tensor.unsqueeze(0))
    assert torch.equal(group.start_all_gather(tensor).wait(), tensor.unsqueeze(0))
    assert group.broadcast(tensor) is tensor
    assert group.gather_objects({"a": 1}) == [{"a": 1}]
    group.barrier()
    assert group.bytes_sent == 0


def test_one_rank_imports_no_deepspeed() -> None:
    code = (
        "import sys, torch\n"
        "from apb_ds.parallel.groups import SequenceGroup, world_group\n"
        "group = world_group()\n"
        "group.broadcast(group.all_gather(torch.zeros(2)))\n"
        "group.gather_objects(1), group.barrier()\n"
        "print(group == SequenceGroup(), group.bytes_sent, 'deepspeed' in sys.modules)"
    )
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, env=environment
    )
    assert (done.returncode, done.stdout.strip()) == (0, "True 0 False"), done.stderr


@pytest.mark.parametrize("missing", [None, *LAUNCHER])
def test_a_launcher_sets_all_variables(no_launcher: pytest.MonkeyPatch, missing: str | None) -> None:
    for name, value in LAUNCHER.items():
        if name != missing:
            no_launcher.setenv(name, value)
    assert (launched_rank(), launched_world_size()) == ((3, 4) if missing is None else (0, 1))


@pytest.mark.parametrize(
    "environment, cores, threads",
    [
        ({}, 8, None),
        ({"LOCAL_WORLD_SIZE": "1"}, 8, None),
        ({"LOCAL_WORLD_SIZE": "2"}, 8, 4),
        ({"LOCAL_SIZE": "2"}, 8, 4),  # deepspeed's name
        ({"LOCAL_WORLD_SIZE": "4", "LOCAL_SIZE": "2"}, 8, 2),
        ({"LOCAL_WORLD_SIZE": "3"}, 8, 2),
        ({"LOCAL_WORLD_SIZE": "8"}, 2, 1),
        ({"LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "7"}, 8, None),
    ],
)
def test_ranks_of_a_node_share_its_cores(
    no_launcher: pytest.MonkeyPatch, environment: dict[str, str], cores: int, threads: int | None
) -> None:
    no_launcher.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in environment.items():
        no_launcher.setenv(name, value)
    asked: list[int] = []
    no_launcher.setattr(groups.torch, "set_num_threads", asked.append)
    no_launcher.setattr(groups.os, "sched_getaffinity", lambda pid: set(range(cores)))
    share_cpu_cores()
    assert asked == ([] if threads is None else [threads])


class NoMpu:
    pass


@pytest.mark.parametrize("mpu", [NoMpu(), object, 3])
def test_an_mpu_without_a_sequence_parallel_group(mpu: Any) -> None:
    with pytest.raises(ValueError, match=r"get_sequence_parallel_group\(\)") as caught:
        SequenceGroup.from_mpu(mpu)
    assert f"mpu={type(mpu).__name__}" in str(caught.value)
