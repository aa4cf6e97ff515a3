"""What is said when memory runs out, and that nothing else is taken for it."""

from __future__ import annotations

import errno

import pytest
import torch

from apb_ds.ops.memory import explain_out_of_memory, is_out_of_memory

HOST = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (MemoryError(), True),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), True),
        (OSError(errno.ENOENT, "No such file"), False),
        (RuntimeError(HOST), True),
        (RuntimeError("not enough memory: you tried to allocate 8 bytes"), True),
        (RuntimeError("mmap: Cannot allocate memory"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("can't allocate memory"), False),
        (KeyError("memory"), False),
    ],
)
def test_is_out_of_memory(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_the_hosts_own_error_is_recognised() -> None:
    """The words are torch's, and may change with it."""
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(raised.value)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nA page of advice."), "2.00 GiB."),
        (RuntimeError(HOST), "can't allocate memory"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_explain_out_of_memory(error: Exception, said: str) -> None:
    with (
        pytest.raises(torch.OutOfMemoryError) as raised,
        explain_out_of_memory("prefilling 1000 tokens", "What helps: more hosts."),
    ):
        raise error
    message = str(raised.value)
    assert message.startswith("out of memory while prefilling 1000 tokens. What helps: more hosts. (")
    assert said in message and "advice" not in message
    assert raised.value.__cause__ is error


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), ValueError("hosts=0"), KeyboardInterrupt()])
def test_other_errors_pass_unchanged(error: BaseException) -> None:
    with pytest.raises(type(error)) as raised, explain_out_of_memory("loading", "What helps: nothing."):
        raise error
    assert raised.value is error
