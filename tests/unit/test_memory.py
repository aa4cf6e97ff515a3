"""The message when memory runs out, and no other error mistaken for it."""

from __future__ import annotations

import errno

import pytest
import torch

import apb_ds
from apb_ds.ops.memory import explain_out_of_memory, is_out_of_memory, levers
from tests.models import build_model, request_ids

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


def test_torchs_host_allocation_error_is_recognised() -> None:
    """The message is torch's, and may change with its version."""
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


@pytest.mark.parametrize("call", ["prefill", "generate", "query_logits"])
def test_every_call_of_an_engine_explains_itself(call: str, monkeypatch: pytest.MonkeyPatch) -> None:
    document, query = request_ids(90, 4)
    engine = apb_ds.init_inference(build_model("llama"), apb_ds.APBConfig(hosts=2, anchor_length=8))
    context = engine.prefill(document)
    before = engine.query_logits(query, context=context)

    def no_memory(*_: object, **__: object) -> None:
        raise RuntimeError(HOST)

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError) as raised:
        patch.setattr(engine.module.model.layers[1].mlp, "forward", no_memory)
        if call == "prefill":
            engine.prefill(document)
        elif call == "generate":
            engine.generate(query_ids=query, context=context, max_new_tokens=2)
        else:
            engine.query_logits(query, context=context)
    doing = "prefilling 90 tokens" if call == "prefill" else "answering 4 query tokens after 90"
    assert f"out of memory while {doing}" in str(raised.value) and "than float32" in str(raised.value)
    assert ("a shorter document or query" in str(raised.value)) is (call != "prefill")
    assert torch.equal(engine.query_logits(query, context=context), before)


def test_levers_match_the_plan() -> None:
    config = apb_ds.APBConfig(hosts=4, hosts_per_round=2)
    joint, alone = (apb_ds.plan_request(each, 1000, 0) for each in (config, apb_ds.APBConfig(hosts=4)))
    assert "hosts_per_round=1 instead of 2" in levers(joint, torch.float32, is_prefill=True)
    answering = levers(joint, torch.float32, is_prefill=False)
    assert "more ranks than 1" in answering and "hosts" not in answering
    said = levers(alone, torch.float32, is_prefill=True)
    assert "more hosts than 4" in said and "than float32" in said and "hosts_per_round" not in said
    ring = apb_ds.plan_request(apb_ds.APBConfig(method="ring"), 1000, 0, 2)
    assert "hosts_per_round" not in levers(ring, torch.float32, is_prefill=True)
