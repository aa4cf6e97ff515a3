"""Where a prefill's time goes: projections, compressor, communication, attention, FFN, by profiler ranges.

On CUDA a part's time is that of the kernels launched within its range; on CPU it is the range's own time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from apb_ds.hf.architecture import attention_modules
from apb_ds.hf.interface import own_attention, projection_modules
from apb_ds.ops import profiling

O_NAMES = ("o_proj", "out_proj", "dense")
FFN_NAMES = ("mlp", "feed_forward")
PROFILED_SDPA = "apb_ds_profiled_sdpa"


def measure_parts(model: PreTrainedModel, work: Callable[[], Any], *, is_plain: bool = False) -> dict[str, Any]:
    """Run `work` under a profiler and return the time of its parts, for JSON.

    Parameters
    ----------
    model : the model that `work` runs
    is_plain : whether its attention is transformers' sdpa, not the engine's

    Returns
    -------
    dict
        ``parts_s``: seconds by the names of `apb_ds.ops.profiling.PARTS`; ``clock``: of the CPU or of CUDA kernels;
        ``unattributed_s``: time in ``other`` of kernels that the profiler does not link to an operation.
    """
    device = next(model.parameters()).device
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with ExitStack() as stack:
        stack.enter_context(profiling.recorded())
        stack.enter_context(submodule_ranges(model))
        if is_plain:
            stack.enter_context(own_attention(model, PROFILED_SDPA, _sdpa_in_range))
        with profile(activities=activities) as profiler:
            with profiling.part(profiling.OTHER):
                work()
            if on_cuda:
                torch.cuda.synchronize(device)
    return attribute(profiler.events(), on_cuda=on_cuda)


@contextmanager
def submodule_ranges(model: PreTrainedModel) -> Iterator[None]:
    """Measure the projections and MLPs of a model as parts; leaving removes all hooks."""
    with ExitStack() as stack:
        for module, name in named_submodules(model):
            for handle in _put_in_range(module, name):
                stack.callback(handle.remove)
        yield


def named_submodules(model: PreTrainedModel) -> list[tuple[nn.Module, str]]:
    """Return the submodules that make up parts, each with its part's name."""
    attentions = set(attention_modules(model).values())
    found = []
    for layer in model.modules():
        for attention in attentions.intersection(layer.children()):
            found += [(projection, profiling.QKV) for projection in projection_modules(attention)]
            for owner, names, part in ((attention, O_NAMES, profiling.O_PROJECTION), (layer, FFN_NAMES, profiling.FFN)):
                modules = (getattr(owner, name, None) for name in names)
                found += [(module, part) for module in modules if isinstance(module, nn.Module)][:1]
    return found


def attribute(events: Iterable[Any], *, on_cuda: bool) -> dict[str, Any]:
    """Attribute the time of a profiler's events to the innermost range around each.

    Parameters
    ----------
    events : of torch.profiler (``FunctionEvent``), with their parents
    on_cuda : whether to count the kernels' time instead of the host's
    """
    microseconds = dict.fromkeys(profiling.PARTS, 0.0)
    all_kernels = 0.0
    for event in events:
        if event.device_type != DeviceType.CPU:
            # The profiler shows ranges on the device's timeline, too; they are not kernels.
            is_range = event.name.startswith(profiling.PREFIX) or getattr(event, "is_user_annotation", False)
            all_kernels += 0.0 if is_range else event.time_range.elapsed_us()
            continue
        part = None if event.is_async else _part_of(event)
        if on_cuda:
            launched = sum(kernel.duration for kernel in event.kernels if not kernel.name.startswith(profiling.PREFIX))
            microseconds[part or profiling.OTHER] += launched
        elif part is not None:
            microseconds[part] += event.self_cpu_time_total
    unattributed = max(0.0, all_kernels - sum(microseconds.values())) if on_cuda else 0.0
    microseconds[profiling.OTHER] += unattributed
    return {
        "clock": "cuda kernels" if on_cuda else "cpu",
        "parts_s": {name: amount / 1e6 for name, amount in microseconds.items()},
        "unattributed_s": unattributed / 1e6,
    }


def _part_of(event: Any) -> str | None:
    """Return the part of the innermost range around an event, or of the event itself; None outside all ranges."""
    while event is not None:
        if event.name.startswith(profiling.PREFIX):
            name = event.name.removeprefix(profiling.PREFIX)
            return name if name in profiling.PARTS else profiling.OTHER
        event = event.cpu_parent
    return None


def _put_in_range(module: nn.Module, name: str) -> list[Any]:
    """Hook a range around each forward of a module; return the hooks' handles."""
    entered: list[Any] = []

    def enter(*_: Any) -> None:
        entered.append(profiling.part(name))
        entered[-1].__enter__()

    def leave(*_: Any) -> None:
        entered.pop().__exit__(None, None, None)

    # Leave after an error, too: a prefill may end with one.
    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave, always_call=True)]


def _sdpa_in_range(*args: Any, **kwargs: Any) -> Any:
    with profiling.part(profiling.ATTENTION):
        return sdpa_attention_forward(*args, **kwargs)
