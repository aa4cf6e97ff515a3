"""Contexts that one number of ranks saves and another loads; a failure of one rank is all ranks'."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from apb_ds.engine import loaded, saved
from tests.engine_cases import TOLERANCE
from tests.models import build_model
from tests.pool import Pools
from tests.together import DOCUMENTS, GIVEN, QUERIES, alone, same_shards

# Turns of more than a page, so that several ranks store them; chunks that ranges of tokens cut through.
TURNS = [QUERIES[0], QUERIES[1]]
# Families, and how many turns are kept; a context with turns is saved from host memory, and loaded there.
CASES = [("llama", 0), *((family, 2) for family in ("llama", "gemma3", "gemma3n", "deepseek_v3"))]
PAGE, CHUNK = 4, 7


def new_engine(family: str, **given: Any) -> Any:
    import apb_ds

    return apb_ds.init_inference(build_model(family), apb_ds.APBConfig(**{**GIVEN, **given}))


def prefilled(engine: Any, num_turns: int) -> Any:
    context = engine.prefill(DOCUMENTS[0], max_positions=200)
    for query in TURNS[:num_turns]:
        alone(engine, query, context, append=True)
    return context


def answers(engine: Any, context: Any) -> dict[str, Any]:
    """Return what is answered from a context, which then has one more turn."""
    found: dict[str, Any] = {"logits": engine.query_logits(QUERIES[2], context=context)}
    branch = context.branch()
    found["branch"] = [alone(engine, query, branch, append=True) for query in QUERIES[:2]]
    found["turn"] = alone(engine, QUERIES[2], context, append=True)
    found["after"] = alone(engine, QUERIES[3], context)
    return found


@cache
def expected(family: str, num_turns: int) -> dict[str, Any]:
    engine = new_engine(family)
    return answers(engine, prefilled(engine, num_turns))


def are_same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    close = float((found["logits"] - wanted["logits"]).abs().max()) < TOLERANCE
    return close and all(found[name] == wanted[name] for name in wanted if name != "logits")


def save_all(rank: int, world_size: int, folder: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("apb_ds.cache.PAGE_TOKENS", PAGE)
        patch.setattr(saved, "CHUNK_TOKENS", CHUNK)
        for family, num_turns in CASES:
            context = prefilled(new_engine(family), num_turns)
            if num_turns:
                context.to_host()
            context.save(folder / f"{family}{num_turns}")


def load_all(rank: int, world_size: int, folder: Path) -> list[tuple[dict[str, Any], list[int]]]:
    """Return the answers of every saved context, and how many tokens each of its layers stores here."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("apb_ds.cache.PAGE_TOKENS", PAGE)
        for family, num_turns in CASES:
            engine = new_engine(family)
            context = engine.load_context(folder / f"{family}{num_turns}", place="host" if num_turns else "device")
            context.to_device()
            stored = [keys.shape[2] for keys, _ in context.cache.shards().values()]
            found.append((answers(engine, context), stored))
    return found


@pytest.mark.parametrize("saving, loading", [(2, (1, 4)), (4, (2,)), (1, (4,))])
def test_another_number_of_ranks_answers_the_same(
    saving: int, loading: tuple[int, ...], pool: Pools, tmp_path: Path
) -> None:
    pool(saving).run(save_all, tmp_path, timeout=180) if saving > 1 else save_all(0, 1, tmp_path)
    assert {path.name for path in (tmp_path / "llama2").iterdir()} == {
        "manifest.json",
        *(f"rank{rank}.safetensors" for rank in range(saving)),
    }
    for world_size in loading:
        ranks = pool(world_size).run(load_all, tmp_path, timeout=180) if world_size > 1 else [load_all(0, 1, tmp_path)]
        for index, (family, num_turns) in enumerate(CASES):
            for by_case in ranks:
                assert are_same(by_case[index][0], expected(family, num_turns)), (family, num_turns, world_size)
        lengths = [by_case[0][1][0] for by_case in ranks]
        assert sum(lengths) == 60 and max(lengths) - min(lengths) <= 1, "llama's document is dealt evenly"


def load_same(rank: int, world_size: int, folder: Path) -> bool:
    engine = new_engine("gemma3")
    context = prefilled(engine, 2)
    context.save(folder / "document")
    loaded = engine.load_context(folder / "document")
    logits = [engine.query_logits(QUERIES[2], context=one) for one in (context, loaded)]
    return same_shards(context, loaded, engine.layers) and torch.equal(*logits)


def test_as_many_ranks_have_the_same_to_the_bit(pool: Pools, tmp_path: Path) -> None:
    assert pool(2).run(load_same, tmp_path) == [True, True]


def error_of(group: Any, call: Callable[[], Any]) -> str:
    """Return what a call raises, once the ranks have met again."""
    try:
        call()
    except Exception as error:
        found = f"{type(error).__name__}: {error}"
    else:
        found = "nothing"
    assert group.gather_objects(1) == [1] * group.world_size
    return found


def failures(rank: int, world_size: int, folder: Path) -> dict[str, str]:
    """Return what this rank is told by name, where the second rank alone fails."""
    engine = new_engine("llama")
    context, other = engine.prefill(DOCUMENTS[0]), engine.prefill(DOCUMENTS[1])
    path = folder / "document"
    context.save(path)
    found = {}

    def fail(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    def out_of_memory(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    def failing(name: str, target: Any, attribute: str, call: Callable[[], Any], how: Any = fail) -> None:
        with pytest.MonkeyPatch.context() as patch:
            if rank == 1:
                patch.setattr(target, attribute, how)
            found[name] = error_of(engine.group, call)

    def missing(*_: Any) -> Any:
        raise KeyError("files")

    failing("write", os, "pwrite", lambda: other.save(path))
    found["left"] = " ".join(sorted(os.listdir(folder)))
    assert same_shards(context, engine.load_context(path), engine.layers)
    failing("memory", loaded.SavedContext, "read_into", lambda: engine.load_context(path), out_of_memory)
    failing("manifest", loaded, "_parsed", lambda: engine.load_context(path), missing)
    found["paths"] = error_of(engine.group, lambda: context.save(folder / f"of rank {rank}"))
    branch = context.branch()
    if rank == 0:
        del branch
    found["branch"] = error_of(engine.group, context.to_host)
    branch = None  # type: ignore[assignment]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(engine), "device", property(lambda _: torch.device("meta")))  # as if it had to move
        patch.setattr("apb_ds.engine.context.shared_validation", lambda *_: shared_on_cpu(engine.group))
        if rank == 1:
            patch.setattr(type(context.cache), "room_on_host", out_of_memory)
        found["to_host"] = error_of(engine.group, context.to_host)
    assert context.place == "device" and len(alone(engine, QUERIES[0], context)) > 0
    if rank == 0:
        data = bytearray((path / "rank1.safetensors").read_bytes())
        data[-1] ^= 1
        (path / "rank1.safetensors").write_bytes(data)
    engine.group.barrier()
    found["flipped"] = error_of(engine.group, lambda: engine.load_context(path))
    if rank == 0:
        shutil.rmtree(path)
    engine.group.barrier()
    found["gone"] = error_of(engine.group, lambda: engine.load_context(path))
    return found


def shared_on_cpu(group: Any) -> Any:
    from apb_ds.parallel.consistency import shared_validation

    return shared_validation(group, "to_host")


def test_a_failure_of_one_rank_is_reported_on_all(pool: Pools, tmp_path: Path) -> None:
    first, second = pool(2).run(failures, tmp_path)
    assert first.pop("left") == second.pop("left") == "document", "nothing unfinished is left"
    assert first["write"] == "OSError: rank 1: [Errno 28] No space left on device"
    assert second["write"] == "OSError: [Errno 28] No space left on device"
    assert first["memory"] == "RuntimeError: rank 1: no memory" and second["memory"] == "OutOfMemoryError: no memory"
    assert first["to_host"] == first["memory"] and second["to_host"] == second["memory"]
    assert "rank 1" in first["manifest"] and "manifest.json was changed" in second["manifest"]
    assert "path is" in first["paths"] and first["paths"] == second["paths"]
    assert "rank 1: the context has branches (number 1)" in first["branch"]
    assert second["branch"] == first["branch"].replace("rank 1: ", "")
    assert "rank 1: " in first["flipped"] and "rank1.safetensors was changed" in first["flipped"]
    assert second["flipped"] == first["flipped"].replace("rank 1: ", "")
    assert "no manifest.json" in first["gone"] and first["gone"] == second["gone"]
