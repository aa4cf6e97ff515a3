"""A model as a pipeline of stages: the tokens of the whole model, what each stage holds, and what it sends."""

from __future__ import annotations

import contextlib
import os
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from deepspeed.runtime.pipe.module import PipelineModule
from torch import Tensor

import apb_ds
from apb_ds.config import APBConfig
from apb_ds.plan import plan_request
from tests.distributed.test_sharded_weights import (
    GIVEN,
    IN_EVERY_WAY,
    METHODS,
    NEW,
    answers,
    expected,
    first_answer,
    new_engine,
    new_model,
)
from tests.launch_in_process import run_infer
from tests.models import request_ids
from tests.pool import Pools
from tests.tiny_checkpoint import byte_tokenizer, save_checkpoint

pytestmark = pytest.mark.whole_weights("says itself where weights are sharded")

HIDDEN_BYTES = 4 * 64  # of a token, in the tests' models


def answer(rank: int, world_size: int, family: str, case: str, options: dict[str, Any]) -> Any:
    given, num_document = METHODS.get(case, (GIVEN, 203))
    engine = new_engine(family, given, **options)
    return (answers if case in IN_EVERY_WAY else first_answer)(engine, num_document)


def check(pool: Pools, world_size: int, family: str, case: str = "", **options: Any) -> None:
    for found in pool(world_size).run(answer, family, case, options, timeout=180):
        assert found == expected(family, case), (family, case)


@pytest.mark.parametrize(
    ("family", "world_size", "stages"),
    [("llama", 2, 2), ("llama", 4, 2), ("gemma3", 4, 2), ("gemma3", 4, 4), ("phi3", 2, 2), ("gpt_oss", 2, 2)],
)
def test_stages_give_the_tokens_of_the_whole_model(pool: Pools, family: str, world_size: int, stages: int) -> None:
    check(pool, world_size, family, stages=stages)


@pytest.mark.parametrize("case", METHODS)
def test_methods(pool: Pools, case: str) -> None:
    check(pool, 4, "llama", case, stages=2)


@pytest.mark.parametrize(("family", "case"), [("llama", "two rounds"), ("gemma3", "")])
def test_stages_whose_weights_are_sharded(pool: Pools, family: str, case: str) -> None:
    check(pool, 4, family, case, stages=2, shard_weights=True)


def held_and_sent(rank: int, world_size: int, family: str, stages: int) -> dict[str, Any]:
    engine = new_engine(family, {**GIVEN, "hosts": 8}, stages=stages)
    pipeline, model = engine.stage.pipeline, engine.module
    document, query = request_ids(203, 9)
    before = pipeline.bytes_between_stages
    found: dict[str, Any] = {
        "stage": pipeline.stage,
        "layers": list(engine.stage.layers),
        "weights": sorted(name for name, _ in model.named_parameters() if "norm" not in name),
    }
    with mock.patch.object(pipeline.rounds, "start_sending", wraps=pipeline.rounds.start_sending) as sends:
        context = engine.prefill(document, query)
    found["rounds"] = [call.args[0].shape[1] for call in sends.call_args_list]
    found["prefill"] = pipeline.bytes_between_stages - before
    found["cached"] = [idx for idx, _ in sorted(context.cache.shards().items())]
    engine.generate(query_ids=query, context=context, max_new_tokens=4, do_sample=False)
    found["decoding"] = pipeline.bytes_between_stages - before - found["prefill"]
    return found


@pytest.mark.parametrize(("family", "world_size", "stages"), [("llama", 4, 2), ("gemma3", 4, 4)])
def test_what_a_stage_holds_and_sends(pool: Pools, family: str, world_size: int, stages: int) -> None:
    whole = new_model(family)
    names = [name for name, _ in whole.named_parameters() if "norm" not in name]
    num_sharing = world_size // stages
    plan = plan_request(APBConfig(**{**GIVEN, "hosts": 8}), 203, 9, num_sharing)
    num_rounds = len(plan.rounds)
    by_rank = pool(world_size).run(held_and_sent, family, stages)
    layers = [found["layers"] for found in by_rank[::num_sharing]]
    assert [*chain(*layers)] == list(range(whole.config.num_hidden_layers)) and all(layers)
    for rank, found in enumerate(by_rank):
        stage = rank // num_sharing
        assert found["stage"] == stage and found["layers"] == layers[stage] == found["cached"]
        is_last = stage == stages - 1
        held = [name for name in names if any(f"layers.{idx}." in name for idx in layers[stage])]
        held += ["model.embed_tokens.weight"] * (stage == 0)
        held += ["lm_head.weight"] * is_last
        assert found["weights"] == sorted(held)
        lengths = [plan.num_forward_tokens(rank % num_sharing, index) for index in range(num_rounds)]
        assert found["rounds"] == ([] if is_last else lengths)
        assert found["prefill"] == (0 if is_last else HIDDEN_BYTES * sum(lengths))
        assert found["decoding"] == (0 if is_last else HIDDEN_BYTES * (9 + 3))


def order_of_rounds(rank: int, world_size: int) -> list[int]:
    """Say which rounds the first stage has computed whenever the second is about to compute one."""
    from apb_ds.engine import prefill

    engine = new_engine("llama", {**GIVEN, "hosts": 8}, stages=2)
    board = torch.distributed.distributed_c10d._get_default_store()
    run_round, seen = prefill.run_round, []

    def run_and_tell(model: Any, attention: Any, state: Any, *ids: Any) -> None:
        ahead = f"round {state.round_index + 1}"
        if rank == 1 and state.round_index + 1 < len(state.plan.rounds):
            board.wait([ahead])  # this round begins once the first stage has computed the next one
        run_round(model, attention, state, *ids)
        if rank == 0:
            board.set(f"round {state.round_index}", "computed")
        seen.append(state.round_index)

    with mock.patch.object(prefill, "run_round", run_and_tell):
        engine.prefill(*request_ids(203, 9))
    return seen


def test_a_stage_computes_a_round_while_the_next_one_has_not_begun_the_round_before(pool: Pools) -> None:
    assert pool(2).run(order_of_rounds, timeout=60) == [list(range(8))] * 2


def queries_together(rank: int, world_size: int) -> list[int]:
    """How many tokens each forward has that a stage sends on, for three queries at once."""
    engine = new_engine("llama", GIVEN, stages=2)
    context = engine.prefill(*request_ids(203, 9))
    queries = [request_ids(20, 3 + index, seed=index)[1] for index in range(3)]
    tokens = engine.stage.pipeline.tokens
    with mock.patch.object(tokens, "start_sending", wraps=tokens.start_sending) as sends:
        logits = engine.query_logits(queries, context=context)
        engine.generate(query_ids=queries, context=context, max_new_tokens=2, do_sample=False)
    for one, found in zip(queries, logits, strict=True):
        torch.testing.assert_close(found, engine.query_logits(one, context=context))
    return [call.args[0].shape[1] for call in sends.call_args_list]


def test_queries_fill_the_pipeline_and_steps_go_together(pool: Pools) -> None:
    first, second = pool(2).run(queries_together)
    assert first == [3, 4 + 5, 3, 4 + 5, 3] and second == []


class AbandonedError(Exception):
    pass


def abandon(rank: int, world_size: int) -> dict[str, Any]:
    """Abandon prefills after some rounds, on all ranks; then answer."""
    engine = new_engine("llama", {**GIVEN, "hosts": 8}, stages=2)
    document, query = request_ids(203, 9)
    context = engine.prefill(document, query)
    for num_rounds in (1, 3, 4):

        def stop(done: int, total: int, num_rounds: int = num_rounds) -> None:
            if done == num_rounds:
                raise AbandonedError

        with pytest.raises(AbandonedError):
            engine.prefill(document, query, progress=stop)
        with pytest.raises(AbandonedError), engine.batch(step_every_s=0.0) as batch:
            batch.submit(query, context=context, max_new_tokens=20, do_sample=False)
            batch.step()
            batch.prefill(document, query, progress=stop)
        paused = iter(range(num_rounds))

        def stop_pausing(paused: Any = paused) -> None:
            if next(paused, None) is None:
                raise AbandonedError

        with engine.batch(step_every_s=0.0, on_pause=stop_pausing) as batch, contextlib.suppress(AbandonedError):
            batch.prefill(document, query)
    return answers(engine, 203)


def test_what_is_abandoned_on_all_ranks_does_no_harm(pool: Pools) -> None:
    whole = answers(new_engine("llama", {**GIVEN, "hosts": 8}), 203)
    for found in pool(4).run(abandon, timeout=120):
        assert found == whole


def answer_where_memory_is_short(rank: int, world_size: int) -> Any:
    """Answer four questions together where a stage of two layers has room for fewer than one of one layer."""
    engine = new_engine("llama", GIVEN, stages=2)
    context = engine.prefill(*request_ids(203, 9))
    queries = [request_ids(20, 3 + index, seed=index)[1] for index in range(4)]
    room = engine.pool.bytes_for([8, *[1] * 4]) * 3 // 2
    with engine.batch(max_bytes=room) as batch:
        handles = [batch.submit(one, context=context, max_new_tokens=5, do_sample=False) for one in queries]
        batch.run()
    alone = [engine.generate(query_ids=one, context=context, max_new_tokens=5, do_sample=False) for one in queries]
    assert [handle.result().tolist() for handle in handles] == [one.tolist() for one in alone]
    return room, engine.pool.document_bytes(100)


def test_stages_of_different_sizes_admit_the_same_requests(pool: Pools) -> None:
    first, second = pool(2).run(answer_where_memory_is_short, timeout=60)
    assert first == second


def load_where_memory_is(rank: int, world_size: int, folder: str, rooms: list[int]) -> list[bool]:
    """Say whether ``auto`` shards where a rank has so much memory."""
    from apb_ds.loading import parts

    decided = []
    options: dict[str, Any] = {"stages": 2, "shard_weights": "auto"}
    for room in rooms:
        with mock.patch.object(parts, "available_bytes", return_value=room):
            model, _ = apb_ds.load_model(folder, dtype="float32", device="cpu", **options)
        engine = apb_ds.init_inference(model, APBConfig(**GIVEN), **options)
        decided.append(engine.weights is not None)
    return decided


def test_auto_is_the_same_in_all_stages(pool: Pools, tmp_path: Path) -> None:
    model = new_model("llama")
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    in_second = sum(weight.nbytes for weight in [*model.model.layers[2].parameters(), model.lm_head.weight])
    in_first = sum(weight.nbytes for weight in model.parameters()) - in_second
    assert in_first > 1.2 * in_second
    rooms = [int(share * in_first / 0.8) for share in (1.1, 0.9)]  # a fifth of the memory is for documents
    assert pool(4).run(load_where_memory_is, str(tmp_path), rooms, timeout=60) == [[False, True]] * 4


def load_stage(rank: int, world_size: int, folders: dict[str, str], options: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for family, folder in folders.items():
        read: list[str] = []
        from transformers import core_model_loading

        copy = core_model_loading._materialize_copy

        def note(tensor: Any, *arguments: Any, copy: Any = copy, read: list[str] = read, **keywords: Any) -> Tensor:
            read.append(str(tensor))
            return copy(tensor, *arguments, **keywords)

        with mock.patch.object(core_model_loading, "_materialize_copy", note):
            model, _ = apb_ds.load_model(folder, dtype="float32", device="cpu", **options)
        weights = {name: parameter.nbytes for name, parameter in model.named_parameters()}
        found[family] = len(read), len(weights)
        engine = apb_ds.init_inference(model, APBConfig(**GIVEN), **options)
        found[f"{family} answers"] = answers(engine, 203)
        with pytest.raises(ValueError, match=r"the model is one of 2 stages of .* ranks already"):
            apb_ds.init_inference(model, APBConfig(**GIVEN), **{**options, "stages": 1})
        dummy, _ = apb_ds.load_model(folder, load_format="dummy", device="cpu", **options)
        assert {name: parameter.nbytes for name, parameter in dummy.named_parameters()} == weights
    return found


@pytest.mark.parametrize(("world_size", "shards"), [(2, False), (4, True)])
def test_a_stage_reads_its_own_weights_alone(pool: Pools, tmp_path: Path, world_size: int, shards: bool) -> None:
    folders = {}
    for family in ("llama", "gemma3"):  # with a head of its own, and with a tied one
        folders[family] = str(tmp_path / family)
        new_model(family).save_pretrained(folders[family])
        byte_tokenizer().save_pretrained(folders[family])
    options = {"stages": 2, "shard_weights": shards}
    for found in pool(world_size).run(load_stage, folders, options, timeout=240):
        for family in folders:
            num_read, num_weights = found[family]
            assert num_read == num_weights < len(list(new_model(family).parameters()))
            assert found[f"{family} answers"] == expected(family, "")


def refusals(rank: int, world_size: int, folder: str) -> None:
    plain: Any = {"config": APBConfig(**GIVEN), "stages": 2}
    document, _ = request_ids(203, 9)
    with pytest.raises(ValueError, match=r"stages=3 must be a divisor of the number of ranks \(2\)"):
        new_engine("llama", GIVEN, stages=3)
    with pytest.raises(ValueError, match="stages is 2 on rank 0, 1 on rank 1"):
        new_engine("llama", GIVEN, stages=2 - rank)
    with pytest.raises(ValueError, match="stages=2 is more than the 1 decoder layers of LlamaForCausalLM"):
        from tests.models import llama

        apb_ds.init_inference(llama(num_hidden_layers=1), **plain)
    with pytest.raises(ValueError, match=rf"as stage {rank + 1} of 2, layers .* load the model again with stages=1"):
        new_engine("gemma3n", GIVEN, stages=2)
    with pytest.raises(ValueError, match="whose layers attend as they were written to"):
        apb_ds.init_inference(object.__new__(PipelineModule), **plain)
    with pytest.raises(ValueError, match=r"adapter='somewhere' needs the whole model"):
        apb_ds.load_model(folder, adapter="somewhere", device="cpu", stages=2)
    engine = new_engine("llama", GIVEN, stages=2)
    context = engine.prefill(document)
    for attempt in (lambda: context.save(f"{folder}/saved"), lambda: engine.load_context(f"{folder}/saved")):
        with pytest.raises(ValueError, match="contexts of a pipeline's stages cannot be saved or loaded"):
            attempt()
    with pytest.raises(RuntimeError, match="this rank has a stage of the model alone"):
        engine.module(document)


def test_refusals(pool: Pools, tmp_path: Path) -> None:
    new_model("llama").save_pretrained(tmp_path)
    pool(2).run(refusals, str(tmp_path))


def test_the_command_line(pool: Pools, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "model")
    given = ["task=prompt", "task.document=A lamp stands on the pier.", "task.query=Where?", "task.max_new_tokens=4"]
    model = [f"model.path={path}", "model.device=cpu", "method.hosts=4", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    for ended in pool(4).run(run_infer, ["-m", *given, *model, "parallel.stages=1,2,4,3"], timeout=120):
        *served, too_many, refused = ended.records
        assert len({record["task"]["prediction"] for record in served}) == 1 and ended.errors[:2] == [None] * 2
        assert [record["metrics"]["ranks"] for record in served] == [4, 2]
        assert [record["metrics"]["stages"] for record in served] == [1, 2]
        assert "stages=4 is more than the 3 decoder layers" in too_many["error"]
        assert "parallel.stages=3 must be a divisor of the number of ranks (4)" in refused["error"]


def run_example(rank: int, world_size: int, method: dict[str, Any], stages: int) -> list[Tensor]:
    from examples import pipeline_module

    with mock.patch.dict(os.environ, {"LOCAL_RANK": str(rank)}):
        engine, request = pipeline_module.make_engine(APBConfig(**method), stages)
    document, query = request_ids(203, NEW)
    return pipeline_module.answer(engine, request, document % 300, query % 300)


@pytest.mark.parametrize("method", [{"hosts": 8, "anchor_length": 12, "passing_length": 5}, {"method": "ring"}])
def test_a_pipeline_module_of_a_hand_written_decoder(pool: Pools, method: dict[str, Any]) -> None:
    (alone,) = pool(1).run(run_example, {"method": "dense"} if "method" in method else method, 1)
    of_first, _, *of_last = pool(4).run(run_example, method, 2, timeout=120)
    assert of_first == [None] * NEW
    for logits in of_last:
        torch.testing.assert_close(torch.cat(logits), torch.cat(alone), atol=1e-5, rtol=1e-5)
