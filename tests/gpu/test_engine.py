"""The engine on a GPU against the explicit-mask reference on the CPU."""

from __future__ import annotations

import gc
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor

import apb_ds
from apb_ds.cache import ShardedCacheLayer
from apb_ds.engine.cuda_graph import DecodeStep
from apb_ds.engine.packed_graphs import PackedStep
from apb_ds.ops.kernels import KERNELS
from tests.engine_cases import Case
from tests.heads import engine_with_heads
from tests.models import HYBRIDS, build_model, request_ids
from tests.reference import reference_greedy, run_reference

pytestmark = pytest.mark.gpu

# Float32 on both sides; matrix products on the device sum in another order. A token too many moves the logits by more
# than 1e-3 (tests/unit/test_reference.py).
FLOAT32_TOLERANCE = 1e-3
# Relative, of all logits together. Weights and activations have 8 bits, and the tiny models' sharp attention makes most
# of it; the plain model in bfloat16 is off by as much. `recent` chooses by position, so that no choice can flip.
BFLOAT16_TOLERANCE = 0.1

GIVEN: list[dict[str, Any]] = [
    {"compressor": "recent"},
    {"hosts": 4, "anchor_length": 12, "passing_length": 5, "compressor": "recent"},
    {"hosts": 4, "anchor_length": 0, "passing_length": 60},
    {"hosts": 1},
    {"method": "star"},
]
CHOOSING: list[dict[str, Any]] = [
    {"hosts": 4, "anchor_length": 12, "passing_length": 5, "compressor": name}
    for name in ("window", "query", "keydiff", "knorm")
]


def reference_settings(given: dict[str, Any]) -> dict[str, Any]:
    settings = dict(given)
    if settings.pop("method", None) == "star":
        settings.update(anchor_length="block", passing_length=0, query_in_anchor=False)
    return settings


def new_engine(family: str, dtype: torch.dtype, **given: Any) -> Any:
    settings = {"fused": False, **given}  # compiling takes longer than everything else here
    engine = apb_ds.init_inference(build_model(family).to(dtype), apb_ds.APBConfig(**settings))
    assert engine.device.type == "cuda" and engine.module.dtype == dtype
    return engine


def answer(engine: Any, document: Tensor, query: Tensor) -> Tensor:
    """Logits of the query, on the CPU; ids go in from there."""
    logits = engine.query_logits(query, context=engine.prefill(document, query))
    assert logits.dtype == torch.float32 and logits.device.type == "cuda"
    return logits.cpu()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


@pytest.mark.parametrize("given", [*GIVEN, *CHOOSING], ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("per_round", [1, None])  # which is all of them in one forward
def test_float32_logits(family: str, given: dict[str, Any], per_round: int | None) -> None:
    document, query = request_ids(203, 7)
    logits = answer(new_engine(family, torch.float32, **given, hosts_per_round=per_round), document, query)
    expected = run_reference(build_model(family), document, query, **reference_settings(given)).logits
    assert float((logits - expected).abs().max()) < FLOAT32_TOLERANCE


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "phi3"])
def test_float32_logits_with_retaining_heads(family: str) -> None:
    case = Case(family, 203, 7, {"hosts": 4, "anchor_length": 12, "passing_length": 5, "compressor": "retaining_heads"})
    document, query = case.ids()
    engine = engine_with_heads(build_model(family))
    engine.configure(apb_ds.APBConfig(**case.given))
    expected = run_reference(build_model(family), document, query, **case.reference_settings(family)).logits
    assert float((answer(engine, document, query) - expected).abs().max()) < FLOAT32_TOLERANCE


@pytest.mark.parametrize("given", GIVEN, ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("per_round", [1, None])
def test_bfloat16_logits(family: str, given: dict[str, Any], per_round: int | None) -> None:
    document, query = request_ids(203, 7)
    logits = answer(new_engine(family, torch.bfloat16, **given, hosts_per_round=per_round), document, query)
    expected = run_reference(build_model(family), document, query, **reference_settings(given)).logits
    assert relative_error(logits, expected) < BFLOAT16_TOLERANCE
    other = run_reference(build_model(family), document, query, hosts=8, anchor_length=0, passing_length=0).logits
    assert relative_error(other, expected) > 2 * BFLOAT16_TOLERANCE, "blocks that see nothing else would be noticed"


@pytest.mark.parametrize("given", GIVEN[:3], ids=str)
@pytest.mark.parametrize("family", HYBRIDS)
def test_hybrids_in_float32(family: str, given: dict[str, Any]) -> None:
    document, query = request_ids(203, 7)
    engine, judge = new_engine(family, torch.float32, **given), build_model(family)
    expected = run_reference(judge, document, query, **given).logits
    assert float((answer(engine, document, query) - expected).abs().max()) < FLOAT32_TOLERANCE
    tokens = engine.generate(document, query, max_new_tokens=6, do_sample=False)
    assert tokens.cpu().tolist() == reference_greedy(judge, document, query, 6, **given).tolist()


@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize("family", HYBRIDS)
def test_hybrids_in_bfloat16(family: str, cuda_graph: bool) -> None:
    document, query = request_ids(203, 7)
    engine = new_engine(family, torch.bfloat16, **GIVEN[1], cuda_graph=cuda_graph)
    context = engine.prefill(document, query)
    logits = engine.query_logits(query, context=context)
    expected = run_reference(build_model(family), document, query, **GIVEN[1]).logits
    # Experts of random routers flip as soon as anything is rounded.
    if family not in ("gpt_oss", "deepseek_v3"):
        assert relative_error(logits.cpu(), expected) < 2 * BFLOAT16_TOLERANCE
    # A step that is replayed sees the tokens that a step run kernel by kernel sees.
    long = engine.generate(query_ids=query, context=context, max_new_tokens=12, do_sample=False)
    again = torch.cat([query.cuda(), long[:, :-1]], dim=1)
    stepwise = engine.query_logits(again, context=context)[:, query.shape[1] - 1 :]
    top = stepwise.topk(2, dim=-1)
    sure = top.values[0, :, 0] - top.values[0, :, 1] > 0.1 * stepwise.abs().max()
    assert sure.any() and torch.equal(long[0][sure], top.indices[0, :, 0][sure])


def test_float32_tokens() -> None:
    given: dict[str, Any] = {"hosts": 4, "anchor_length": 12, "passing_length": 5}
    document, query = request_ids(101, 5)
    engine = new_engine("llama", torch.float32, **given)
    tokens = engine.generate(document, query, max_new_tokens=8, do_sample=False)
    assert tokens.cpu().tolist() == reference_greedy(build_model("llama"), document, query, 8, **given).tolist()
    assert engine.stats.new_tokens == 8 and engine.stats.prefill_s > 0


def test_bfloat16_generates_and_keeps_its_context() -> None:
    document, query = request_ids(203, 7)
    engine = new_engine("llama", torch.bfloat16, hosts=4)
    context = engine.prefill(document.cuda(), query.cuda())
    before = engine.query_logits(query, context=context)
    tokens = engine.generate(query_ids=query, context=context, max_new_tokens=6, do_sample=False)
    assert tokens.shape == (1, 6) and tokens.dtype == torch.int64
    assert int(tokens[0, 0]) == int(before[0, -1].argmax())
    assert torch.equal(engine.query_logits(query, context=context), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_kernels_in_use_are_reported(dtype: torch.dtype) -> None:
    engine = new_engine("llama", dtype)
    names = engine.kernel_names
    assert set(names) - {"recorded"} == {"prefill", "decode"}
    assert all(KERNELS[name].device_type == "cuda" for name in names.values())
    if dtype == torch.float32:
        assert names == {"prefill": "torch_efficient", "decode": "torch_efficient"}


@pytest.mark.parametrize("name", [name for name, kernel in KERNELS.items() if kernel.device_type != "cpu"])
def test_a_kernel_asked_for_by_name_serves_a_request(name: str) -> None:
    kernel = KERNELS[name]
    if not kernel.is_installed():
        pytest.skip(f"missing: the package {kernel.package} ({kernel.extra})")
    reason = kernel.why_not(torch.device("cuda", 0), torch.bfloat16, 16)
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    given: dict[str, Any] = {"hosts": 4, "anchor_length": 12, "passing_length": 5, "compressor": "recent"}
    document, query = request_ids(203, 7)
    engine = new_engine("llama", torch.bfloat16, kernel=name, **given)
    recorded = {"recorded": name} if kernel.can_be_recorded else {}
    assert engine.kernel_names == {"prefill": name, "decode": name} | recorded
    expected = run_reference(build_model("llama"), document, query, **given).logits
    assert relative_error(answer(engine, document, query), expected) < BFLOAT16_TOLERANCE
    assert engine.generate(document, query, max_new_tokens=4, do_sample=False).shape == (1, 4)


def test_a_cpu_kernel_does_not_fit() -> None:
    with pytest.raises(ValueError, match="runs on cpu, not on cuda"):
        new_engine("llama", torch.float32, kernel="cpu_flash")


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3"])
def test_fused_layers(family: str) -> None:
    document, query = request_ids(203, 7)
    given: dict[str, Any] = {"hosts": 4, "anchor_length": 12, "passing_length": 5, "compressor": "recent"}
    reference = run_reference(build_model(family), document, query, **given).logits
    for dtype, tolerance in ((torch.float32, FLOAT32_TOLERANCE), (torch.bfloat16, BFLOAT16_TOLERANCE)):
        plain, fused = (new_engine(family, dtype, fused=on, **given) for on in (False, True))
        assert (
            fused._acceleration.fused.counts["norms"]
            and fused._acceleration.fused.counts["mlps"]
            and fused._acceleration.fused.counts["rotations"]
        )
        expected = answer(plain, document, query)
        actual = answer(fused, document, query)
        if dtype == torch.float32:
            torch.testing.assert_close(actual, reference, atol=tolerance, rtol=0)
        assert relative_error(actual, reference) < tolerance
        assert fused.generate(document, query, max_new_tokens=4, do_sample=False).shape == (1, 4)
        assert torch.equal(answer(plain, document, query), expected)


class Scores(LogitsProcessor):
    """Keeps the logits of every token, and has always the same tokens chosen."""

    def __init__(self) -> None:
        self.seen: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.seen.append(scores.cpu())
        forced = torch.full_like(scores, -torch.inf)
        forced[:, 3 + 7 * len(self.seen)] = 0.0
        return forced


@pytest.mark.parametrize("name", ["torch_flash", "flash_attn3"])
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_recorded_decode_steps(family: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if not KERNELS[name].is_installed() or KERNELS[name].why_not(torch.device("cuda", 0), torch.bfloat16, 16):
        pytest.skip(f"{name} does not serve this here")
    document, query = request_ids(203, 7)
    records = 0
    record = DecodeStep.record

    def counted(*arguments: Any) -> None:
        nonlocal records
        records += 1
        record(*arguments)

    def poisoned(self: Any, states: Tensor, capacity: int) -> Tensor:
        return states.new_full((*states.shape[:2], capacity, states.shape[3]), torch.nan)

    monkeypatch.setattr(ShardedCacheLayer, "_buffer_like", poisoned)  # as memory may come
    monkeypatch.setattr(DecodeStep, "record", counted)
    logits = []
    for cuda_graph in (False, True, True):
        if len(logits) < 2:
            engine = new_engine(family, torch.bfloat16, hosts=4, kernel=name, cuda_graph=cuda_graph)
        scores = Scores()
        engine.generate(document, query, max_new_tokens=12, do_sample=False, logits_processor=[scores])
        logits.append(torch.cat(scores.seen).float())
    assert records == 1, "the second request has its buffers where the first one had them"
    assert relative_error(logits[1], logits[0]) < BFLOAT16_TOLERANCE / 5
    assert relative_error(logits[2], logits[1]) < BFLOAT16_TOLERANCE / 5
    assert relative_error(logits[0].roll(1, dims=0), logits[0]) > BFLOAT16_TOLERANCE, "a token late would be noticed"


def ask_together(engine: Any, num_new: int, **given: Any) -> list[Tensor]:
    """Answers to five queries about two documents, on the CPU."""
    contexts = [engine.prefill(request_ids(n, 5, seed=n)[0], max_positions=n + 60) for n in (203, 150)]
    queries = [request_ids(20, 3 + index, seed=index)[1] for index in range(5)]
    about = [contexts[index % 2] for index in range(5)]
    answers = engine.generate(query_ids=queries, context=about, max_new_tokens=num_new, do_sample=False, **given)
    if "settings" not in given:
        alone = [
            engine.generate(query_ids=query, context=context, max_new_tokens=num_new, do_sample=False)
            for query, context in zip(queries, about, strict=True)
        ]
        assert [answer.tolist() for answer in answers] == [answer.tolist() for answer in alone]
    return [answer.cpu() for answer in answers]


@pytest.mark.parametrize("family", ["llama", "phi3", "gemma3", "gpt_oss", "deepseek_v3"])
def test_queries_together_have_the_tokens_of_one_at_a_time(family: str) -> None:
    ask_together(new_engine(family, torch.float32, hosts=4, anchor_length=12, passing_length=5), 9)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt_oss"])
def test_recorded_steps_of_packs(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same tokens are forced in all runs, so that the logits can be compared."""
    records = 0
    record = PackedStep.record

    def counted(*arguments: Any) -> Any:
        nonlocal records
        records += 1
        return record(*arguments)

    monkeypatch.setattr(PackedStep, "record", counted)
    logits = []
    for cuda_graph in (False, True):
        engine = new_engine(family, torch.bfloat16, hosts=4, cuda_graph=cuda_graph)
        scores = [Scores() for _ in range(5)]
        ask_together(engine, 12, settings=[{"logits_processor": [of_query]} for of_query in scores])
        logits.append(torch.cat([torch.cat(of_query.seen) for of_query in scores]).float())
    assert records == 1
    assert relative_error(logits[1], logits[0]) < BFLOAT16_TOLERANCE / 5
    assert relative_error(logits[0].roll(1, dims=0), logits[0]) > BFLOAT16_TOLERANCE, "a token late would be noticed"


def test_packs_about_further_documents_are_recorded(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Recordings go with their documents, and with the last one the memory that recordings share."""
    replays = mock.Mock(side_effect=PackedStep.run)
    monkeypatch.setattr(PackedStep, "run", lambda *arguments: replays(*arguments))
    engine = new_engine("llama", torch.bfloat16, hosts=4, cuda_graph=True)
    answers = []
    for number in range(3):
        answers.append(ask_together(engine, 12, settings=[{}] * 5))
        assert replays.call_count > 3 * number
        gc.collect()
    assert "cannot be recorded" not in caplog.text
    assert all(torch.equal(*pair) for other in answers[1:] for pair in zip(answers[0], other, strict=True))
