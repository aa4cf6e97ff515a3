"""Contexts in host memory and on disk: the same to the bit, or refused by name."""

from __future__ import annotations

import errno
import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import apb_ds
from apb_ds.cache import ShardedCache
from apb_ds.engine import moved, saved, saved_files
from apb_ds.engine.cuda_graph import RecordedSteps
from apb_ds.engine.loaded import read_manifest
from apb_ds.engine.moved import copy_shards
from tests.models import build_model
from tests.together import DOCUMENTS, GIVEN, NEW, QUERIES, alone, same_shards

# Full attention, tied embeddings, windows in all or some layers, layers that share keys, latent attention, sinks.
FAMILIES = ["llama", "qwen3", "mistral_window", "gemma3", "gemma3n", "deepseek_v3", "gpt_oss", "dynamic_rope"]
CPU = torch.device("cpu")


def new_engine(family: str = "llama", model_seed: int = 0, **given: Any) -> Any:
    return apb_ds.init_inference(build_model(family, model_seed), apb_ds.APBConfig(**{**GIVEN, **given}))


@pytest.fixture(scope="module")
def engine() -> Any:
    return new_engine()


@pytest.fixture
def context(engine: Any) -> Any:
    return engine.prefill(DOCUMENTS[0], QUERIES[0], max_positions=200)


@pytest.fixture
def path(context: Any, tmp_path: Path) -> Path:
    """Where `context` was saved, in a folder without anything else."""
    (tmp_path / "saved").mkdir()
    context.save(tmp_path / "saved" / "document")
    return tmp_path / "saved" / "document"


def assert_same(engine: Any, first: Any, second: Any) -> None:
    assert same_shards(first, second, engine.layers)
    assert torch.equal(first.token_ids, second.token_ids) and first.num_cached == second.num_cached
    logits = [engine.query_logits(QUERIES[2], context=context) for context in (first, second)]
    assert torch.equal(*logits)


def move(cache: ShardedCache, room: Any) -> None:
    copy_shards(room, cache.shards(), CPU)
    cache.use_copies(room)


def stored_bytes(context: Any) -> int:
    """Return the bytes of what is stored, without spare room."""
    return sum(states.nbytes for shard in context.cache.shards().values() for states in shard)


# --- on disk --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loaded_context_is_the_same_to_the_bit(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved, "CHUNK_TOKENS", 7)
    engine = new_engine(family)
    context = engine.prefill(DOCUMENTS[0], QUERIES[0], max_positions=200)
    for append in (False, True):
        context.save(tmp_path / "document")
        loaded = new_engine(family).load_context(tmp_path / "document")
        assert_same(engine, context, engine.load_context(tmp_path / "document"))
        assert (loaded.plan, loaded.max_positions) == (context.plan, context.max_positions)
        assert alone(loaded.engine, QUERIES[1], loaded) == alone(engine, QUERIES[1], context, append=append)
    assert context.num_tokens == context.num_cached + 1, "the turn's last token is not in the cache"
    context.save(tmp_path / "document")
    loaded = engine.load_context(tmp_path / "document")
    assert_same(engine, context, loaded)
    branches = [loaded.branch(), context.branch()]
    for query in QUERIES[:2]:
        answers = [alone(engine, query, branch, append=True) for branch in branches]
        assert answers[0] == answers[1] == alone(engine, query, loaded, append=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype, tmp_path: Path) -> None:
    engine = apb_ds.init_inference(build_model("llama").to(dtype), apb_ds.APBConfig(**GIVEN))
    context = engine.prefill(DOCUMENTS[0])
    context.save(tmp_path / "document")
    loaded = engine.load_context(tmp_path / "document")
    assert loaded.cache.layer(0).shard()[0].dtype == dtype
    assert_same(engine, context, loaded)


def test_the_files_are_safetensors(context: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saved, "CHUNK_TOKENS", 25)
    context.save(tmp_path / "document")
    assert sorted(os.listdir(tmp_path / "document")) == ["manifest.json", "rank0.safetensors"]
    found = load_file(tmp_path / "document" / "rank0.safetensors")
    for layer_idx, shard in context.cache.shards().items():
        for name, states in zip(("keys", "values"), shard, strict=True):
            chunks = [found.pop(f"layers.{layer_idx}.{name}.{number}") for number in range(3)]
            assert [chunk.shape[1] for chunk in chunks] == [25, 25, 10]
            assert torch.equal(torch.cat(chunks, dim=1), states[0])
    assert not found


def test_a_loaded_context_has_the_room_of_a_prefilled_one(engine: Any, context: Any, path: Path) -> None:
    loaded = engine.load_context(path)
    assert loaded.num_bytes == context.num_bytes
    stored = sum(
        states.numel() * states.element_size() for shard in context.cache.shards().values() for states in shard
    )
    file = path / "rank0.safetensors"
    assert stored < context.num_bytes and stored <= file.stat().st_size < stored + 2000


def test_a_context_is_replaced_once_the_new_one_is_whole(
    engine: Any, context: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    rename = os.rename

    def watched(source: Any, target: Any) -> None:
        if Path(source).name.endswith(saved.PARTIAL):
            engine.load_context(source)
            seen.append(Path(target))
        rename(source, target)

    other = engine.prefill(DOCUMENTS[1])
    monkeypatch.setattr(os, "rename", watched)
    other.save(path)
    assert seen == [path] and os.listdir(path.parent) == [path.name]
    assert_same(engine, other, engine.load_context(path))


@pytest.mark.parametrize("when", ["first write", "later write", "fsync", "manifest", "rename"])
def test_a_disk_that_fails_leaves_what_was_there(
    when: str, engine: Any, context: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = [0]
    error = OSError(errno.ENOSPC, "No space left on device")

    def failing(at: int, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            counts[0] += 1
            if counts[0] == at:
                raise error
            return real(*arguments)

        return call

    other = engine.prefill(DOCUMENTS[1])
    name, at = {
        "first write": ("pwrite", 1),
        "later write": ("pwrite", 4),
        "fsync": ("fsync", 1),
        "manifest": ("fsync", 2),
        "rename": ("rename", 2),
    }[when]
    with monkeypatch.context() as patch:
        patch.setattr(os, name, failing(at, getattr(os, name)))
        with pytest.raises(OSError, match="No space left"):
            other.save(path)
        assert counts[0] >= at
    assert os.listdir(path.parent) == [path.name]
    assert_same(engine, context, engine.load_context(path))
    with monkeypatch.context() as patch:
        counts[0] = 0
        patch.setattr(os, name, failing(at if when != "rename" else 1, getattr(os, name)))
        with pytest.raises(OSError, match="No space left"):
            other.save(path.with_name("new"))
    assert os.listdir(path.parent) == [path.name]


def test_short_writes_and_reads_go_on(
    engine: Any, context: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: pwrite(file, data[:1000], offset))
    monkeypatch.setattr(os, "preadv", lambda file, parts, offset: preadv(file, [parts[0][:1000]], offset))
    context.save(tmp_path / "document")
    assert_same(engine, context, engine.load_context(tmp_path / "document"))


def test_where_a_context_is_not_saved(context: Any, path: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("a year's work")
    (tmp_path / "link").symlink_to(path)
    for wrong, reason in (
        (tmp_path / "folder", "not a saved context"),
        (tmp_path / "folder" / "thesis.txt", "not a saved context"),
        (tmp_path / "link", "not a saved context"),
        (tmp_path / "none" / "document", "not a directory"),
        (7, "must be a path"),
    ):
        with pytest.raises(ValueError, match=reason):
            context.save(wrong)
    assert os.listdir(tmp_path / "folder") == ["thesis.txt"]


# --- refusals -------------------------------------------------------------------------------------------------------


def flip(file: Path, at: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def edit(path: Path, change: Callable[[dict[str, Any]], Any], *, in_head: bool = False) -> None:
    """Change a manifest as another version of the program would have written it."""
    head_text, contents_text = (path / "manifest.json").read_text().splitlines()
    head, contents = json.loads(head_text), json.loads(contents_text)
    change(head if in_head else contents)
    text = json.dumps(contents)
    head["checksum"] = saved_files.crc(memoryview(text.encode()))
    (path / "manifest.json").write_text(f"{json.dumps(head)}\n{text}\n")


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a byte of the data": (lambda path: flip(path / "rank0.safetensors", -1), r"rank0.*layers\.2\.values\.0"),
    "a byte of the header": (lambda path: flip(path / "rank0.safetensors", 20), "rank0.*header"),
    "a byte of the manifest": (lambda path: flip(path / "manifest.json", -9), "manifest.*changed"),
    "a byte of its first line": (lambda path: flip(path / "manifest.json", 13), "not a saved context"),
    "a truncated file": (lambda path: os.truncate(path / "rank0.safetensors", 3000), "rank0.*truncated"),
    "a truncated manifest": (lambda path: os.truncate(path / "manifest.json", 300), "manifest.*changed"),
    "an empty manifest": (lambda path: os.truncate(path / "manifest.json", 0), "not a saved context"),
    "a missing file": (lambda path: (path / "rank0.safetensors").unlink(), "rank0.*cannot be read"),
    "a missing manifest": (lambda path: (path / "manifest.json").unlink(), "no manifest"),
    "another program's manifest": (lambda path: (path / "manifest.json").write_text("{}"), "not a saved context"),
    "binary": (lambda path: (path / "manifest.json").write_bytes(b"\xff\xfe"), "cannot be read"),
    "another version": (lambda path: edit(path, lambda head: head.update(version=2), in_head=True), "version 2"),
    "a missing field": (lambda path: edit(path, lambda contents: contents.pop("files")), "manifest.*changed"),
    "other layers": (lambda path: edit(path, lambda contents: contents["layers"].pop()), "model|layers|changed"),
    "too many positions": (lambda path: edit(path, lambda contents: contents.update(max_positions=9999)), "9999"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_context_is_refused(what: str, engine: Any, path: Path) -> None:
    damage, reason = DAMAGES[what]
    engine.load_context(path)
    damage(path)
    with pytest.raises(ValueError, match=reason):
        engine.load_context(path)


def test_a_file_that_shrinks_while_it_is_read(engine: Any, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "preadv", lambda *_: 0)
    with pytest.raises(ValueError, match=r"rank0.*truncated"):
        engine.load_context(path)


def test_what_is_no_context_is_refused(engine: Any, path: Path) -> None:
    for wrong in (path.parent, path.parent / "none", path / "rank0.safetensors", None):
        with pytest.raises(ValueError, match=r"not a saved context|cannot be read|must be a path"):
            engine.load_context(wrong)
    with pytest.raises(ValueError, match="place='disk'"):
        engine.load_context(path, place="disk")


def test_another_model_is_refused(engine: Any, path: Path) -> None:
    with pytest.raises(ValueError, match="another model: weights is"):
        new_engine(model_seed=1).load_context(path)
    with pytest.raises(ValueError, match=r"another model: class is LlamaForCausalLM .* Qwen3ForCausalLM here"):
        new_engine("qwen3").load_context(path)
    half = apb_ds.init_inference(build_model("llama").bfloat16(), apb_ds.APBConfig(**GIVEN))
    with pytest.raises(ValueError, match=r"another model: dtype is float32 .* bfloat16 here"):
        half.load_context(path)
    changed = new_engine()
    changed.load_context(path)
    changed.module.model.layers[1].self_attn.k_proj.weight[0, 0] += 1e-3
    with pytest.raises(ValueError, match="another model: weights is"):
        changed.load_context(path)
    rotated = new_engine()
    rotated.module.model.rotary_emb.inv_freq[1] *= 1.01
    with pytest.raises(ValueError, match="another model: rotary frequencies"):
        rotated.load_context(path)
    with pytest.raises(ValueError, match=r"another model.*config\.rope"):
        new_engine("llama3_rope").load_context(path)


@pytest.mark.parametrize(
    "given, reason",
    [
        ({"hosts": 2}, "hosts is 4 in the saved context and 2 here"),
        ({"anchor_length": 9}, "anchor_length is 8 .* 9 here"),
        ({"compression_ratio": 2}, "passing_length is 4 .* 8 here"),
        ({"compressor": "knorm"}, "compressor is window .* knorm here"),
        ({"query_in_anchor": False}, "anchor's query tokens is 6 .* 0 here"),
        ({"query_position": 2}, "query_position is 1 .* 2 here"),
        ({"hosts": 1}, "exact is False .* True here"),
    ],
)
def test_other_settings_are_refused(given: dict[str, Any], reason: str, path: Path) -> None:
    with pytest.raises(ValueError, match=f"another method's settings: .*{reason}"):
        new_engine(**given).load_context(path)


def test_settings_that_do_not_change_the_content(engine: Any, context: Any, path: Path) -> None:
    for given in (
        {"schedule": "natural"},
        {"hosts_per_round": 2},
        {"shard_anchor": False},
        {"mlp_tile": 8},
        {"seed": 3},
    ):
        other = new_engine(**given)
        assert alone(other, QUERIES[1], other.load_context(path)) == alone(engine, QUERIES[1], context)


def test_a_random_compressors_seed_counts(tmp_path: Path) -> None:
    new_engine(compressor="random", seed=3).prefill(DOCUMENTS[0]).save(tmp_path / "document")
    new_engine(compressor="random", seed=3).load_context(tmp_path / "document")
    with pytest.raises(ValueError, match=r"seed is 3 .* 4 here"):
        new_engine(compressor="random", seed=4).load_context(tmp_path / "document")


def test_settings_of_the_prefill_are_saved_not_later_ones(tmp_path: Path) -> None:
    engine = new_engine()
    context = engine.prefill(DOCUMENTS[0])
    engine.configure({**GIVEN, "compressor": "knorm"})
    context.save(tmp_path / "document")
    with pytest.raises(ValueError, match="compressor is window"):
        engine.load_context(tmp_path / "document")
    engine.configure(GIVEN)
    assert_same(engine, context, engine.load_context(tmp_path / "document"))


# --- in host memory -------------------------------------------------------------------------------------------------


def test_a_context_on_the_host_is_refused_until_it_is_back(engine: Any, context: Any) -> None:
    expected = alone(engine, QUERIES[1], context)
    with engine.batch(max_sequences=1) as batch:
        batch.submit(QUERIES[0], document_ids=DOCUMENTS[1], max_new_tokens=3)
        waiting = batch.submit(QUERIES[0], context=context, max_new_tokens=3)
        batch.step()
        context.to_host()
        context.to_host()
        assert context.place == "host"
        for refused in (
            lambda: engine.generate(query_ids=QUERIES[0], context=context),
            lambda: engine.query_logits(QUERIES[0], context=context),
            lambda: engine.query_logits([QUERIES[0]], context=context),
            lambda: batch.submit(QUERIES[0], context=context),
            context.branch,
        ):
            with pytest.raises(ValueError, match=r"context\.to_device\(\)"):
                refused()
        batch.run()
        assert "to_device" in str(waiting.error)
    context.to_device()
    context.to_device()
    assert context.place == "device" and alone(engine, QUERIES[1], context) == expected


def test_a_context_that_is_shared_does_not_move(engine: Any, context: Any) -> None:
    branch = context.branch()
    further = branch.branch()
    with pytest.raises(ValueError, match=r"branches \(number 1, 2\).*free"):
        context.to_host()
    branch.free()
    del further
    with engine.batch() as batch:
        batch.submit(QUERIES[0], context=context, max_new_tokens=NEW)
        batch.step()
        with pytest.raises(ValueError, match="running requests"):
            context.to_host()
        assert context.place == "device"
        batch.run()
        context.to_host()
    assert context.place == "host"


@pytest.mark.parametrize("family", FAMILIES)
def test_copies_are_the_same_to_the_bit(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPU nothing has to move, so this copies as if it had to."""
    monkeypatch.setattr(moved, "PIECE_BYTES", 1000)  # several pieces, the last one shorter
    engine = new_engine(family)
    context, plain = (engine.prefill(DOCUMENTS[0], QUERIES[0], max_positions=200) for _ in range(2))
    for one in (context, plain):
        alone(engine, QUERIES[1], one, append=True)
        one.cache.forget_unreachable()
    before, capacity = context.num_bytes, context.cache.layer(0).capacity
    move(context.cache, context.cache.room_on_host())
    stored = sum(
        states.numel() * states.element_size() for shard in context.cache.shards().values() for states in shard
    )
    assert context.num_bytes == stored < before, "without spare room"
    assert same_shards(context, plain, engine.layers)
    move(context.cache, context.cache.room_on_device(CPU))
    assert context.num_bytes == before and context.cache.layer(0).capacity == capacity
    assert_same(engine, context, plain)
    assert alone(engine, QUERIES[2], context, append=True) == alone(engine, QUERIES[2], plain, append=True)


def test_a_context_is_saved_from_the_host_and_loaded_there(engine: Any, context: Any, tmp_path: Path) -> None:
    plain = engine.prefill(DOCUMENTS[0], QUERIES[0], max_positions=200)
    context.to_host()
    move(context.cache, context.cache.room_on_host())
    context.save(tmp_path / "document")
    loaded = engine.load_context(tmp_path / "document", place="host")
    assert loaded.place == "host"
    with pytest.raises(ValueError, match="to_device"):
        loaded.branch()
    loaded.to_device()
    assert_same(engine, plain, loaded)
    assert alone(engine, QUERIES[1], loaded, append=True) == alone(engine, QUERIES[1], plain, append=True)


def test_what_is_read_into_host_memory_has_no_spare_room(engine: Any, context: Any, path: Path) -> None:
    """On CPU the engine reads into buffers with room, since they need not move."""
    cache = ShardedCache(engine.layers, 0, 1, 60, new_tokens=140)
    found = read_manifest(path)
    found.read_into(cache, found.shard_span(0, 1), CPU, on_host=True)
    assert cache.num_bytes == stored_bytes(context) < context.num_bytes
    move(cache, cache.room_on_device(CPU))
    assert cache.num_bytes == context.num_bytes
    for layer_idx, shard in context.cache.shards().items():
        assert all(map(torch.equal, shard, cache.shards()[layer_idx]))


def test_a_failed_copy_changes_nothing(engine: Any, context: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = alone(engine, QUERIES[1], context)

    def fail(*_: Any) -> Any:
        raise torch.OutOfMemoryError("host memory")

    monkeypatch.setattr(type(engine), "device", property(lambda _: torch.device("meta")))  # as if it had to move
    with monkeypatch.context() as patch:
        patch.setattr(ShardedCache, "room_on_host", fail)
        with pytest.raises(torch.OutOfMemoryError):
            context.to_host()
    monkeypatch.undo()
    assert context.place == "device" and alone(engine, QUERIES[1], context) == expected


def test_a_recorded_step_does_not_keep_the_buffers_of_a_context_that_leaves() -> None:
    from weakref import ref

    class Cache:
        pass

    recorded, user, other = RecordedSteps(torch.nn.Linear(1, 1), apb_ds.engine.engine.SequenceGroup()), Cache(), Cache()
    recorded._step, recorded._user = object(), ref(user)  # type: ignore[assignment]
    recorded.let_go(other)  # type: ignore[arg-type]
    assert recorded._step is not None
    recorded.let_go(user)  # type: ignore[arg-type]
    assert recorded._step is None


def test_pickling_says_what_to_do_instead(context: Any) -> None:
    with pytest.raises(TypeError, match=r"context\.save"):
        pickle.dumps(context)
