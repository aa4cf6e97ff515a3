"""Models whose weights DeepSpeed ZeRO-3 partitions: each module's are gathered for its forward and released after it.

DeepSpeed's hooks do so, with messages between all ranks. So all ranks must run the same modules in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from apb_ds.parallel.groups import SequenceGroup


def is_partitioned(model: nn.Module) -> bool:
    """Whether ZeRO-3 partitions the model's weights."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def check_partition(model: nn.Module, group: SequenceGroup, shard_weights: bool) -> None:
    """Raise ValueError if ZeRO-3 partitions a model otherwise than the ranks of `group` can gather its weights."""
    parameter: Any = next((parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")), None)
    if parameter is None:
        return
    if shard_weights:
        raise ValueError("DeepSpeed ZeRO-3 partitions the model's weights already; leave shard_weights out.")
    ranks = torch.distributed.get_process_group_ranks(parameter.ds_process_group)
    alone = [torch.distributed.get_rank()]
    ours = alone if group.process_group is None else torch.distributed.get_process_group_ranks(group.process_group)
    if ours != ranks:
        raise ValueError(
            f"DeepSpeed ZeRO-3 partitions the model's weights over ranks {ranks}, but ranks {ours} share a request; "
            "they must be the same."
        )


def whole_weights(model: nn.Module) -> dict[str, Callable[[], Tensor] | None]:
    """Return, by name, what gathers each partitioned weight; None for one that is tied to another."""
    from deepspeed.runtime.zero import GatheredParameters

    def gather_of(parameter: nn.Parameter) -> Callable[[], Tensor]:
        def gather() -> Tensor:
            with GatheredParameters([parameter]):
                return parameter.detach().clone()

        return gather

    found: dict[str, Callable[[], Tensor] | None] = {}
    seen: set[int] = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if hasattr(parameter, "ds_id"):
            found[name] = None if id(parameter) in seen else gather_of(parameter)
            seen.add(id(parameter))
    return found


@contextmanager
def releasing(model: nn.Module) -> Iterator[None]:
    """Release what modules have gathered whose forward an exception ends, since DeepSpeed then does not."""
    if not is_partitioned(model):
        yield
        return
    from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
    from deepspeed.runtime.zero.partitioned_param_coordinator import iter_params
    from deepspeed.utils import z3_leaf_module

    depth = len(FWD_MODULE_STACK)
    try:
        yield
    finally:
        while len(FWD_MODULE_STACK) > depth:
            module = FWD_MODULE_STACK.pop()
            for parameter in iter_params(module, recurse=z3_leaf_module(module)):
                parameter.ds_active_sub_modules.discard(module.ds_id)
                is_used = parameter.ds_persist or parameter.ds_active_sub_modules
                if parameter.ds_status == ZeroParamStatus.AVAILABLE and not is_used:
                    parameter.partition()
