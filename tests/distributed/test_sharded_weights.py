"""Weights that are sharded over the ranks: the tokens of whole ones, what each rank holds, and what it sends."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

import apb_ds
from apb_ds.config import APBConfig
from apb_ds.plan import plan_request
from apb_ds.utils.sizes import num_prefilled
from tests.launch_in_process import run_infer
from tests.models import build_model, llama, qwen2, request_ids
from tests.pool import Pools
from tests.tiny_checkpoint import byte_tokenizer, save_checkpoint

GIVEN: dict[str, Any] = {"hosts": 4, "anchor_length": 12, "passing_length": 5}
METHODS: dict[str, tuple[dict[str, Any], int]] = {
    "idle ranks": ({"hosts": 8, "anchor_length": 0, "passing_length": 1, "schedule": "natural"}, 5),
    "two rounds": ({"hosts": 8, "anchor_length": 12, "passing_length": 5, "hosts_per_round": 1}, 203),
    "anchor on every rank": ({**GIVEN, "shard_anchor": False}, 203),
    "random": ({**GIVEN, "compressor": "random"}, 203),
    "query": ({**GIVEN, "compressor": "query"}, 203),
    "retaining heads": ({**GIVEN, "compressor": "retaining_heads"}, 203),
    "star": ({"method": "star", "hosts": 4}, 203),
    "ring": ({"method": "ring"}, 203),
    "ulysses": ({"method": "ulysses"}, 203),
    "a short document": (GIVEN, 9),
}
IN_EVERY_WAY = {"", "two rounds", "idle ranks"}  # cases in which more than one query is answered
QUERIES = 3
NEW = 5
FOUR_KV_HEADS, TIED = "llama with 4 KV heads", "qwen2 tied and of odd sizes"

pytestmark = pytest.mark.whole_weights("compares sharded weights with whole ones")


def new_model(family: str) -> Any:
    if family == TIED:
        return qwen2(vocab_size=515, intermediate_size=99, tie_word_embeddings=True)
    return llama(num_key_value_heads=4) if family == FOUR_KV_HEADS else build_model(family)


def new_engine(family: str, given: dict[str, Any], **options: Any) -> Any:
    from tests.heads import engine_with_heads

    if given.get("compressor") != "retaining_heads":
        return apb_ds.init_inference(new_model(family), apb_ds.APBConfig(**given), **options)
    engine = engine_with_heads(build_model(family), **options)
    engine.configure(apb_ds.APBConfig(**given))
    return engine


def first_answer(engine: Any, num_document: int = 203) -> list[Any]:
    """The tokens of an answer."""
    document, query = request_ids(num_document, 9)
    tokens: list[Any] = engine.generate(document, query, max_new_tokens=NEW, do_sample=False).tolist()
    return tokens


def answers(engine: Any, num_document: int) -> dict[str, Any]:
    """Answers alone and together, kept turns, and a document that is prefilled while others are answered."""
    document, query = request_ids(num_document, 9)
    reach = {"max_positions": num_document + 100}
    context = engine.prefill(document, query, **reach)
    queries = [request_ids(20, 3 + index, seed=index)[1] for index in range(QUERIES)]
    given = {"max_new_tokens": NEW, "do_sample": False}
    found: dict[str, Any] = {"first": engine.generate(query_ids=query, context=context, **given)}
    for index, one in enumerate(queries):
        found[f"alone {index}"] = engine.generate(query_ids=one, context=context, **given)
    found["together"] = torch.cat(engine.generate(query_ids=queries, context=context, **given))
    with engine.batch(step_every_s=0.0) as batch:
        handles = [batch.submit(one, context=context, max_new_tokens=12, do_sample=False) for one in queries]
        batch.step()
        other = batch.prefill(request_ids(num_document, 5, seed=7)[0], query, **reach)
        batch.run()
    found["long"] = torch.cat([handle.result() for handle in handles])
    found["other"] = engine.generate(query_ids=query, context=other, **given)
    found["turn"] = engine.generate(query_ids=query, context=other, append=True, **given)
    return {name: tokens.tolist() for name, tokens in found.items()}


def answer(
    rank: int,
    world_size: int,
    family: str,
    case: str,
    shard_ranks: int | None = None,
) -> dict[str, Any]:
    given, num_document = METHODS.get(case, (GIVEN, 203))
    engine = new_engine(family, given, shard_weights=True, shard_ranks=shard_ranks)
    weights = engine.weights
    context = engine.prefill(*request_ids(num_document, 9))
    gathered = [weights.gatherer._layers[layer_idx] for layer_idx in range(num_prefilled(engine.layers))]
    in_layers = [linear.weight for linears in gathered for linear in linears]
    sent = sum(weight.numel() * weight.element_size() for weight in in_layers)
    sent *= (shard_ranks or world_size) - 1
    assert weights.num_gathered_bytes == sent * len(context.plan.rounds)
    found = (answers if case in IN_EVERY_WAY else first_answer)(engine, num_document)
    return {
        "answers": found,
        "facts": engine.model_facts(),
        "mine": hashlib.sha256(b"".join(weight.detach().numpy().tobytes() for weight in in_layers)).hexdigest(),
        "is_gathering": weights.gatherer.is_gathering,
        "rows": sum(module.weight.numel() for module in engine.module.modules() if hasattr(module, "whole")),
        "whole": any(module.whole is not None for module in engine.module.modules() if hasattr(module, "whole")),
    }


@cache
def expected(family: str, case: str) -> Any:
    given, num_document = METHODS.get(case, (GIVEN, 203))
    if given.get("method") in ("ring", "ulysses"):
        given = {"method": "dense"}
    return (answers if case in IN_EVERY_WAY else first_answer)(new_engine(family, given), num_document)


@cache
def expected_first(family: str) -> list[Any]:
    return first_answer(new_engine(family, GIVEN))


def check(pool: Pools, world_size: int, family: str, case: str = "", shard_ranks: int | None = None) -> None:
    num_rows = sum(
        module.weight.numel()
        for name, module in new_model(family).named_modules()
        if type(module) is torch.nn.Linear and ("layers" in name or name == "lm_head")
    )
    by_rank = pool(world_size).run(answer, family, case, shard_ranks, timeout=180)
    for found in by_rank:
        assert found["answers"] == expected(family, case), (family, case)
        assert not found["is_gathering"] and not found["whole"]
        assert found["facts"] == by_rank[0]["facts"]
        assert found["rows"] < 1.25 * num_rows / (shard_ranks or world_size)
    parts = [found["mine"] for found in by_rank]
    part = parts[: shard_ranks or world_size]
    assert len(set(part)) == len(part) and parts == part * (world_size // len(part)), "equal copies, of different parts"


@pytest.mark.parametrize(("family", "world_size"), [("llama", 4), ("qwen2", 2), (TIED, 4), ("phi3", 2), ("gemma3", 2)])
def test_sharded_weights_give_the_tokens_of_whole_ones(pool: Pools, family: str, world_size: int) -> None:
    check(pool, world_size, family)


@pytest.mark.parametrize("case", METHODS)
def test_methods(pool: Pools, case: str) -> None:
    check(pool, 4 if case == "idle ranks" else 2, "llama", case)


@pytest.mark.parametrize(
    ("family", "case", "shard_ranks"),
    [
        ("llama", "random", 1),
        ("gemma3", "two rounds", 2),
        ("llama", "random", 2),
        ("llama", "retaining heads", 2),
        ("llama", "ring", 2),
        (FOUR_KV_HEADS, "ulysses", 2),
        ("llama", "idle ranks", 2),
    ],
)
def test_several_copies(pool: Pools, family: str, case: str, shard_ranks: int) -> None:
    check(pool, 4, family, case, shard_ranks)


def refuse(rank: int, world_size: int, families: list[str], folder: str) -> list[str]:
    from apb_ds.loading import ModelConfig, load_model

    refusals = []
    for family in families:
        for attempt in (
            lambda family=family: new_engine(family, GIVEN, shard_weights=True),
            lambda family=family: load_model(ModelConfig(path=f"{folder}/{family}", shard_weights=True)),
        ):
            with pytest.raises(ValueError, match=r"^weights of \w+ cannot be sharded") as raised:
                attempt()
        refusals.append(str(raised.value))
    return refusals


def test_models_with_experts_are_refused_by_name(pool: Pools, tmp_path: Path) -> None:
    names = {"deepseek_v3": "DeepseekV3Experts", "gpt_oss": "GptOssTopKRouter"}
    for family in names:
        build_model(family).save_pretrained(tmp_path / family)
    for refusals in pool(2).run(refuse, sorted(names), str(tmp_path)):
        assert all(name in refusal for name, refusal in zip(names.values(), refusals, strict=True)), refusals


def test_idle_ranks_have_no_tokens() -> None:
    given, num_tokens = METHODS["idle ranks"]
    plan = plan_request(APBConfig(**given), num_tokens, 0, 4)
    assert not plan.exact and min(plan.num_forward_tokens(rank, 0) for rank in range(4)) == 0


def test_one_rank_has_all_of_it() -> None:
    engine = new_engine("llama", GIVEN, shard_weights=True)
    assert first_answer(engine) == expected_first("llama")
    assert engine.weights.num_gathered_bytes == 0
    with pytest.raises(ValueError, match="the model's weights are sharded over the ranks; use shard_weights=True"):
        apb_ds.init_inference(engine.module, APBConfig(**GIVEN))
    again = apb_ds.init_inference(engine.module, APBConfig(**GIVEN), shard_weights=True)
    assert first_answer(again) == expected_first("llama")


def load_parts(rank: int, world_size: int, folders: dict[str, str], shard_ranks: int | None = None) -> dict[str, Any]:
    """Load each model in parts, and dummies of it; return their answers."""
    from apb_ds.loading import ModelConfig, load_model
    from apb_ds.parallel.groups import world_group
    from apb_ds.weights.layers import ShardedLinear

    group = world_group()
    part = group.part(shard_ranks)
    found: dict[str, Any] = {}
    for family, folder in folders.items():
        rows = {}
        for load_format in ("auto", "dummy"):
            config = ModelConfig(path=folder, load_format=load_format, shard_weights=True, dtype="float32")
            model = load_model(config, group=part).model
            for name, module in model.named_modules():
                if type(module) is torch.nn.Linear and "layers" in name:
                    rows[name] = len(module.weight), module.out_features
            options: Any = {"shard_weights": True, "shard_ranks": shard_ranks}
            engine = apb_ds.init_inference(model, APBConfig(**GIVEN), group=group, **options)
            found[f"{family} {load_format}"] = first_answer(engine)
            assert not any(type(module) is torch.nn.Linear for module in model.model.layers.modules())
            assert any(isinstance(module, ShardedLinear) for module in model.modules())
        assert rows and all(mine == -(-whole // part.world_size) for mine, whole in rows.values())
        found[f"{family} facts"] = engine.model_facts()["weights"]
    return found


@pytest.mark.parametrize(("world_size", "shard_ranks"), [(1, None), (2, None), (4, None), (4, 2)])
def test_models_that_are_loaded_in_parts(pool: Pools, tmp_path: Path, world_size: int, shard_ranks: int | None) -> None:
    folders = {}
    for family in ("qwen2", "phi3", "gemma3") if world_size == 4 and not shard_ranks else ("qwen2",):
        folders[family] = str(tmp_path / family)
        build_model(family).save_pretrained(folders[family])
        byte_tokenizer().save_pretrained(folders[family])
    by_rank = pool(world_size).run(load_parts, folders, shard_ranks, timeout=240)
    for found in by_rank:
        assert found == by_rank[0]
        for family in folders:
            assert found[f"{family} auto"] == expected_first(family)
            assert found[f"{family} dummy"] != expected_first(family)


def load_where_memory_is(
    rank: int, world_size: int, folder: str, rooms: list[int], shard_ranks: int | None
) -> dict[str, Any]:
    """Load with ``auto`` where ranks have so much memory; return answers, what is held, and what was to be held."""
    from apb_ds.loading import ModelConfig, load_model, parts
    from apb_ds.parallel.groups import world_group
    from apb_ds.weights.cut import WeightSizes

    config = ModelConfig(path=folder, dtype="float32", device="cpu", shard_weights="auto")
    with mock.patch.object(parts, "available_bytes", lambda _: rooms[rank]):
        loaded = load_model(config, group=world_group().part(shard_ranks))
    engine = apb_ds.init_inference(
        loaded.model, APBConfig(**GIVEN), group=world_group(), shard_weights="auto", shard_ranks=shard_ranks
    )
    found: dict[str, Any] = {"shards": loaded.shard_weights, "answer": first_answer(engine)}
    if loaded.shard_weights:
        sizes = WeightSizes.of(build_model("qwen2"), shard_ranks or world_size)
        gatherer = engine.weights.gatherer
        with gatherer.gathering([0]):
            gathered = sum(buffer.nbytes for buffers in gatherer._buffers for buffer in buffers.values())
        found["held"] = sum(parameter.nbytes for parameter in engine.module.parameters()), gathered
        found["to be held"] = sizes.part + sizes.replicated, sizes.gathered
    return found


def test_auto_is_what_the_rank_with_least_memory_needs(pool: Pools, tmp_path: Path) -> None:
    folder = str(tmp_path / "model")
    build_model("qwen2").save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    enough, short = [10**9] * 4, [10**9, 10**9, 10**5, 10**9]
    for rooms, shard_ranks, shards in ((enough, 2, False), (short, None, True), (short, 2, True)):
        for found in pool(4).run(load_where_memory_is, folder, rooms, shard_ranks, timeout=180):
            assert found["shards"] == shards and found["answer"] == expected_first("qwen2")
            assert found.get("held") == found.get("to be held") and ("held" in found) == shards


def load_without_files(rank: int, world_size: int, folder: str) -> str:
    from apb_ds.loading import ModelConfig, load_model
    from apb_ds.parallel.groups import world_group

    path = folder if rank == 0 else f"{folder}/nowhere"
    with pytest.raises(ValueError, match="nowhere") as raised:
        load_model(ModelConfig(path=path, device="cpu", shard_weights="auto"), group=world_group())
    return str(raised.value)


def test_a_rank_without_files_fails_all_before_they_decide(pool: Pools, tmp_path: Path) -> None:
    build_model("qwen2").save_pretrained(tmp_path)
    first, second = pool(2).run(load_without_files, str(tmp_path))
    assert first == f"rank 1: {second}"


def load_adapted(rank: int, world_size: int, values: dict[str, Any]) -> list[Any]:
    """The answer of a model that this rank has loaded and merged an adapter into, in parts if the values say so."""
    from apb_ds.loading import ModelConfig, load_model
    from apb_ds.parallel.groups import world_group

    config = ModelConfig(dtype="float32", device="cpu", **values)
    shards = {"shard_weights": bool(config.shard_weights)}
    model = load_model(config, group=world_group()).model
    return first_answer(apb_ds.init_inference(model, APBConfig(**GIVEN), **shards))


@pytest.mark.parametrize("world_size", [2, 4])
def test_an_adapter_is_merged_by_rows(pool: Pools, tmp_path: Path, world_size: int) -> None:
    peft = pytest.importorskip("peft")
    build_model("qwen2").save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    lora = {"task_type": "CAUSAL_LM", "r": 4, "target_modules": "all-linear", "init_lora_weights": False}
    peft.get_peft_model(build_model("qwen2"), peft.LoraConfig(**lora)).save_pretrained(tmp_path / "adapter")
    values = {"path": str(tmp_path / "model"), "adapter": str(tmp_path / "adapter")}
    whole = load_adapted(0, 1, values)
    assert whole != expected_first("qwen2")
    for found in pool(world_size).run(load_adapted, {**values, "shard_weights": True}, timeout=180):
        assert found == whole


def test_facts_of_parts_are_those_of_the_whole_model(pool: Pools) -> None:
    whole = new_engine("llama", GIVEN).model_facts()
    for found in pool(2).run(facts_of_parts):
        assert found == whole


def facts_of_parts(rank: int, world_size: int) -> dict[str, str]:
    facts: dict[str, str] = new_engine("llama", GIVEN, shard_weights=True).model_facts()
    return facts


def save_and_load(rank: int, world_size: int, folder: str) -> list[Any]:
    """Answers about documents that sharded and whole weights have saved, each loaded by the next."""
    document, query = request_ids(203, 9)
    found = []
    options: list[dict[str, Any]] = [
        {"shard_weights": False},
        {"shard_weights": True},
        {"shard_weights": True, "shard_ranks": 1},
    ]
    for number, given in enumerate(options):
        engine = new_engine("llama", GIVEN, **given)
        engine.prefill(document).save(Path(folder) / str(number))
        other = new_engine("llama", GIVEN, **options[number - 1])
        context = other.load_context(Path(folder) / str(number))
        found.append(other.generate(query_ids=query, context=context, max_new_tokens=NEW, do_sample=False)[0].tolist())
    return found


def test_contexts_are_saved_for_whole_weights_and_loaded_by_sharded_ones(pool: Pools, tmp_path: Path) -> None:
    for answers in pool(2).run(save_and_load, str(tmp_path)):
        assert answers == [answers[0]] * 3


def ways_to_load(rank: int, world_size: int, folder: str) -> list[Any]:
    """Answers of a model that is loaded and sharded through the package's own functions, and what they refuse."""
    options: dict[str, Any] = {"shard_weights": True, "shard_ranks": 2}
    model, _ = apb_ds.load_model(folder, dtype="float32", **options)
    with pytest.raises(ValueError, match=r"in parts already, of 32 rows where shard_ranks=4 makes 16"):
        apb_ds.init_inference(model, APBConfig(**GIVEN), shard_weights=True)
    engine = apb_ds.init_inference(model, APBConfig(**GIVEN), **options)
    with pytest.raises(ValueError, match=r"in parts already, of 32 rows where shard_ranks=1 makes 64"):
        apb_ds.init_inference(model, APBConfig(**GIVEN), shard_weights=True, shard_ranks=1)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"shard_ranks": 2}, "shard_ranks=2 needs shard_weights=true"),
        ({**options, "shard_ranks": 3}, r"shard_ranks=3 must be a divisor of the number of ranks \(4\)"),
        ({**options, "shard_ranks": 0}, "shard_ranks=0 must be an integer of at least 1"),
        ({**options, "shard_ranks": True}, "shard_ranks=True must be an integer"),
        ({**options, "shard_ranks": 4 if rank == 3 else 2}, "shard_ranks is 2 on ranks 0, 1, 2, 4 on rank 3"),
    ]
    for given, message in refused:
        with pytest.raises(ValueError, match=message):
            apb_ds.load_model(folder, **given)
        with pytest.raises(ValueError, match=message):
            new_engine("llama", GIVEN, **given)
    return [first_answer(engine), engine.weights.gatherer._layers[0][0].weight.detach().tolist()]


def test_models_are_loaded_for_several_copies(pool: Pools, tmp_path: Path) -> None:
    build_model("llama").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    whole = build_model("llama").model.layers[0].self_attn.q_proj.weight.tolist()
    for rank, (found, rows) in enumerate(pool(4).run(ways_to_load, str(tmp_path), timeout=120)):
        assert found == expected_first("llama")
        assert rows == whole[32 * (rank % 2) : 32 * (rank % 2 + 1)]


def answer_in_pairs(rank: int, world_size: int) -> list[Any]:
    """The answer of two groups that do not know of each other, in which the weights are sharded."""
    from tests.distributed.test_groups import PairsMpu

    return first_answer(new_engine("llama", GIVEN, mpu=PairsMpu(rank, world_size), shard_weights=True))


def test_groups_of_an_mpu_share_weights_among_themselves(pool: Pools) -> None:
    assert pool(4).run(answer_in_pairs, timeout=120) == [expected_first("llama")] * 4


def test_a_sweep_of_copies(pool: Pools, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path / "model")
    given = ["task=prompt", "task.document=A lamp stands on the pier.", "task.query=Where?", "task.max_new_tokens=4"]
    model = [f"model.path={path}", "model.device=cpu", "method.hosts=4", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    sweep = ["-m", *given, *model, "model.shard_weights=true", "parallel.shard_ranks=1,2,4,3"]
    for ended in pool(4).run(run_infer, sweep, timeout=120):
        *served, refused = ended.records
        assert len({record["task"]["prediction"] for record in served}) == 1 and ended.errors[:3] == [None] * 3
        assert "parallel.shard_ranks=3 must be a divisor of the number of ranks (4)" in refused["error"]
        assert all(record["model"]["shard_weights"] is True for record in served)
        sent = [max(record["metrics"]["bytes_sent"]) for record in served]
        assert sent[0] < sent[1] < sent[2], sent  # in place
