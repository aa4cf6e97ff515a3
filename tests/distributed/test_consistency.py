"""Ranks started with different settings, weights, versions or input: all are told what differs before they work."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from apb_ds.report.paths import hide_paths
from tests.launch_in_process import run_infer
from tests.models import build_model, request_ids
from tests.pool import Pools
from tests.tiny_checkpoint import save_checkpoint

GIVEN: dict[str, Any] = {"hosts": 4, "anchor_length": 12, "passing_length": 4}
N, Q = 101, 5


def new_engine(**given: Any) -> Any:
    import apb_ds

    return apb_ds.init_inference(build_model("llama"), apb_ds.APBConfig(**{**GIVEN, **given}))


def message_of(call: Callable[[], Any]) -> str:
    """Return the message of the ValueError that `call` raises, and check that the group still works."""
    try:
        call()
    except ValueError as error:
        import importlib

        groups = importlib.import_module("apb_ds.parallel.groups")
        assert groups.world_group().gather_objects(1) == [1, 1]
        return str(error)
    return "nothing was raised"


# --- making an engine


def other_settings(rank: int, world_size: int) -> str:
    return message_of(lambda: new_engine(passing_length=4 + rank))


def settings_that_one_rank_refuses(rank: int, world_size: int) -> str:
    return message_of(lambda: new_engine(hosts=4 - rank))


def other_weights(rank: int, world_size: int) -> str:
    import apb_ds

    model = build_model("llama")
    with torch.no_grad():
        value = model.model.layers[1].mlp.up_proj.weight[3, 5]
        value.copy_(torch.nextafter(value, value + rank))  # one bit of one number, on rank 1
    return message_of(lambda: apb_ds.init_inference(model, apb_ds.APBConfig(**GIVEN)))


def rows_in_another_order(rank: int, world_size: int) -> str:
    import apb_ds

    model = build_model("llama")
    if rank == 1:
        with torch.no_grad():
            model.lm_head.weight.copy_(model.lm_head.weight.roll(1, dims=0))
    return message_of(lambda: apb_ds.init_inference(model, apb_ds.APBConfig(**GIVEN)))


def other_dtype(rank: int, world_size: int) -> str:
    import apb_ds

    model = build_model("llama").to(torch.bfloat16 if rank else torch.float32)
    return message_of(lambda: apb_ds.init_inference(model, apb_ds.APBConfig(**GIVEN)))


def other_model_config(rank: int, world_size: int) -> str:
    import apb_ds

    model = build_model("llama3_rope" if rank else "llama")
    return message_of(lambda: apb_ds.init_inference(model, apb_ds.APBConfig(**GIVEN)))


def other_versions(rank: int, world_size: int) -> str:
    import apb_ds.parallel.consistency as consistency

    found = {**consistency.versions(), "transformers": f"5.{23 - rank}.0"}
    with mock.patch.object(consistency, "versions", lambda: found):
        return message_of(new_engine)


def other_source(rank: int, world_size: int) -> str:
    import apb_ds.parallel.consistency as consistency

    with mock.patch.object(consistency, "source_digest", lambda: f"digest{rank}"):
        return message_of(new_engine)


# --- calling it


def other_documents(rank: int, world_size: int) -> str:
    document, query = request_ids(N, Q)
    document[0, 50] += rank - rank * 2 * int(document[0, 50] > 0)
    engine = new_engine()
    return message_of(lambda: engine.prefill(document, query))


def other_lengths(rank: int, world_size: int) -> str:
    document, query = request_ids(N + rank, Q)
    engine = new_engine()
    return message_of(lambda: engine.generate(document, query, max_new_tokens=2))


def other_queries(rank: int, world_size: int) -> str:
    document, query = request_ids(N, Q)
    engine = new_engine()
    context = engine.prefill(document)
    return message_of(lambda: engine.query_logits(query.roll(rank), context=context))


def other_contexts(rank: int, world_size: int) -> str:
    document, query = request_ids(N, Q)
    engine = new_engine()
    contexts = [engine.prefill(document), engine.prefill(document.flip(1))]
    return message_of(lambda: engine.generate(query_ids=query, context=contexts[rank], max_new_tokens=2))


def other_numbers_of_new_tokens(rank: int, world_size: int) -> str:
    document, query = request_ids(N, Q)
    engine = new_engine()
    return message_of(lambda: engine.generate(document, query, max_new_tokens=2 + rank))


def other_calls(rank: int, world_size: int) -> str:
    document, query = request_ids(N, Q)
    engine = new_engine()
    if rank == 0:
        return message_of(lambda: engine.prefill(document, query))
    return message_of(lambda: engine.generate(document, query, max_new_tokens=2))


def other_settings_later(rank: int, world_size: int) -> str:
    import apb_ds

    document, query = request_ids(N, Q)
    engine = new_engine()
    engine.configure(apb_ds.APBConfig(**{**GIVEN, "compressor": ("window", "knorm")[rank]}))
    return message_of(lambda: engine.prefill(document, query))


def input_that_one_rank_refuses(rank: int, world_size: int) -> str:
    document, query = request_ids(N, Q)
    engine = new_engine()
    return message_of(lambda: engine.prefill(document, query if rank == 0 else query[:, :0]))


CASES: dict[Callable[..., str], tuple[str, ...]] = {
    other_settings: ("method.passing_length is 4 on rank 0, 5 on rank 1",),
    settings_that_one_rank_refuses: ("hosts=3", "multiple"),
    other_weights: ("model: weights model.layers.1.mlp.up_proj.weight is float32 (96, 64)", "on rank 0", "on rank 1"),
    rows_in_another_order: ("model: weights lm_head.weight is",),
    other_dtype: ("model: dtype is float32 on rank 0, bfloat16 on rank 1",),
    other_model_config: ("model: config.rope_parameters is", "llama3"),
    other_versions: ("version of transformers is 5.23.0 on rank 0, 5.22.0 on rank 1",),
    other_source: ("source of apb_ds is digest0 on rank 0, digest1 on rank 1",),
    other_documents: ("document_ids is 101 tokens", "sums"),
    other_lengths: ("document_ids is 101 tokens", "102 tokens"),
    other_queries: ("query_ids is 5 tokens [",),
    other_contexts: ("context is", "prefill"),
    other_numbers_of_new_tokens: ("max_new_tokens is 2 on rank 0, 3 on rank 1",),
    other_calls: ("call is prefill on rank 0, generate on rank 1",),
    other_settings_later: ("method.compressor is window on rank 0, knorm on rank 1",),
    input_that_one_rank_refuses: ("query_ids is empty",),
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_every_rank_names_the_difference(pool: Pools, case: Callable[..., str]) -> None:
    messages = pool(2).run(case)
    for message in messages:
        for part in CASES[case]:
            assert part in message, message
    first, second = (message.removeprefix("rank 1: ") for message in messages)
    assert first == second


def same_with_other_clocks(rank: int, world_size: int) -> list[Any]:
    """Only the first rank draws tokens, so sampling settings may differ."""
    document, query = request_ids(N, Q)
    engine = new_engine()
    context = engine.prefill(document, query)
    draws = {"do_sample": True, "temperature": 1.0 + rank, "max_time": 60.0 + rank}
    tokens = engine.generate(query_ids=query, context=context, max_new_tokens=3, **draws)
    sent = engine.group.bytes_sent
    assert engine.group.is_same(b"same") and not engine.group.is_same(bytes([rank]))
    assert engine.group.is_same(b"same", torch.device("cpu")) and not engine.group.is_same(
        bytes([rank]), torch.device("cpu")
    )
    assert engine.group.bytes_sent == sent  # only the request's bytes are counted
    return [tokens.tolist(), context.key]


def test_sampling_settings_may_differ(pool: Pools) -> None:
    first, second = pool(2).run(same_with_other_clocks)
    assert first == second and first[1]


def asked_messages(rank: int, world_size: int) -> dict[str, int]:
    """Count the exchanges of digests per answer."""
    document, query = request_ids(N, Q)
    engine = new_engine()
    counts = {}
    with mock.patch.object(type(engine.group), "is_same", autospec=True, return_value=True) as asked:
        for num_new in (1, 12):
            before = asked.call_count
            engine.generate(document, query, max_new_tokens=num_new, do_sample=False)
            counts[f"{num_new} tokens"] = asked.call_count - before
    return counts


def test_one_exchange_for_an_answer_of_any_length(pool: Pools) -> None:
    assert pool(2).run(asked_messages) == [{"1 tokens": 1, "12 tokens": 1}] * 2


def test_a_group_of_one_rank_computes_no_digest() -> None:
    document, query = request_ids(N, Q)
    with (
        mock.patch("apb_ds.parallel.consistency.hashlib", None),
        mock.patch("apb_ds.parallel.consistency.describe_model", None),
        mock.patch("apb_ds.parallel.consistency.describe_ids", None),
    ):
        engine = new_engine()
        context = engine.prefill(document, query)
        engine.query_logits(query, context=context)
    assert context.key == ""


# --- checksums


def test_checksums_depend_on_values_and_their_order_alone() -> None:
    from apb_ds.parallel.consistency import checksum

    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int64):
        tensor = (torch.randn(70, 300, generator=generator) * 50).to(dtype)
        sums = checksum(tensor).tolist()
        assert checksum(tensor.clone()).tolist() == sums
        assert checksum(tensor.t().contiguous().t()).tolist() == sums  # strides do not matter
        others = [
            tensor.roll(1, dims=0),
            tensor.roll(1, dims=1),
            tensor.t().reshape(70, 300),
            torch.cat([tensor[:1], tensor[:1], tensor[2:]]),
        ]
        for index in (0, 4095, 4096, 20999):
            changed = tensor.clone()
            changed.view(-1)[index] += (
                1 if dtype in (torch.int8, torch.int64) else changed.view(-1)[index] * 0.01 + 1e-3
            )
            others.append(changed)
        swapped = tensor.clone()
        swapped.view(-1)[[10, 20]] = swapped.view(-1)[[20, 10]]
        others.append(swapped)
        found = [checksum(other).tolist() for other in others]
        assert sums not in found
        assert len({str(one) for one in found}) == len(found)


def test_tied_and_empty_tensors() -> None:
    from apb_ds.parallel.consistency import describe_model

    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.ones(3, 2))
    model.tied = model.weight
    model.nothing = torch.nn.Parameter(torch.empty(0, 2))
    model.number = torch.nn.Parameter(torch.tensor(3.5))
    found = describe_model(model)
    assert sorted(found) == [
        "class",
        "dtype",
        "weights nothing",
        "weights number",
        "weights weight",
    ]
    other = copy.deepcopy(model)
    other.number.data.neg_()
    assert [name for name, value in describe_model(other).items() if value != found[name]] == ["weights number"]


# --- the launch scripts


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("consistency")
    (directory / "document.txt").write_text("A lamp stands on the pier. It is lit at dusk. " * 8)
    save_checkpoint(directory / "good")
    return directory


def infer_with_own(rank: int, world_size: int, arguments: list[str], own: list[list[str]]) -> Any:
    return run_infer(rank, world_size, [*arguments, *own[rank]])


@pytest.mark.parametrize(
    ("own", "parts"),
    [
        (["method.hosts=4", "method.hosts=8"], ("method.hosts is 4 on rank 0, 8 on rank 1",)),
        (["method.hosts=4", "method.hosts=3"], ("rank 1: method.hosts=3", "multiple")),
        (["method.hosts=3", "method.hosts=4"], ("hosts=3", "multiple")),
        (["task.query=When?", "task.query=Who?"], ("task.query is When? on rank 0, Who? on rank 1",)),
        (["seed=1", "seed=2"], ("seed is 1 on rank 0, 2 on rank 1",)),
    ],
)
def test_other_command_lines(pool: Pools, files: Path, tmp_path: Path, own: list[str], parts: tuple[str, ...]) -> None:
    shared = {
        "model.path": f"{files}/good",
        "model.device": "cpu",
        "task": "prompt",
        "task.document": f"@{files}/document.txt",
        "task.query": "What?",
        "method.hosts": "4",
        "hydra.run.dir": str(tmp_path / "run"),
    }
    given = {override.partition("=")[0] for override in own}
    arguments = [f"{name}={value}" for name, value in shared.items() if name not in given]
    ended = pool(2).run(infer_with_own, arguments, [[override] for override in own], timeout=120)
    assert [rank.code for rank in ended] == [2, 2]
    for part in parts:
        assert part in ended[0].stderr, ended[0].stderr
    assert ended[0].stderr.count("Error:") == 1 and ended[1].stderr == ""
    kept = json.loads((tmp_path / "run" / "record.json").read_text())["error"]
    assert kept == hide_paths(ended[0].errors[0], tmp_path / "run")
