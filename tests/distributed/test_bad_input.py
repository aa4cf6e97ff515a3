"""Bad input on one and two ranks: a helpful message, an exit code on every rank, and no waiting."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from apb_ds.report.paths import hide_paths
from tests.heads import random_checkpoint, save_heads
from tests.launch_in_process import Ended, run_infer
from tests.models import build_model
from tests.pool import Pools
from tests.tiny_checkpoint import TEMPLATE, byte_tokenizer, save_checkpoint

MAX_SECONDS = 10.0  # a rank that waits for another takes five minutes, the collective's timeout
FAILED = 2


@dataclass(frozen=True)
class Case:
    """Overrides, and what the message must name.

    Attributes
    ----------
    world_sizes : where the case is one
    patches : see `run_infer`
    composes : false if Hydra refuses it: then the first rank alone speaks, and there is no job
    early : whether one rank alone refuses it before heavy imports, so that there is no job either; several ranks meet
        first, to tell each other
    """

    overrides: tuple[str, ...]
    parts: tuple[str, ...]
    world_sizes: tuple[int, ...] = (1, 2)
    patches: tuple[str, ...] = ()
    composes: bool = True
    early: bool = False
    stdin: str = ""


PROMPT = ("task=prompt", "task.document=@{files}/document.txt", "task.query=What is it?")

TEMPLATES = {
    "omits": TEMPLATE.replace("in messages", "in messages if m.role != 'system'"),
    "needs": "{% if messages[0].role != 'system' %}{{ raise_exception('a system turn must come first') }}{% endif %}",
    "fails": "{{ 1 + 'a' }}",
}

CASES: dict[str, Case] = {
    # --- text
    "empty document": Case(("task=prompt", "task.document=''", "task.query=x"), ("task.document=''", "empty", "@FILE")),
    "document of spaces": Case(("task=prompt", "task.document='  '", "task.query=x"), ("task.document", "empty")),
    "empty document file": Case(
        ("task=prompt", "task.document=@{files}/empty.txt", "task.query=x"), ("task.document=", "empty.txt", "empty")
    ),
    "empty query": Case((*PROMPT, "task.query=''"), ("task.query=''", "empty")),
    "no query": Case(("task=prompt", "task.document=x"), ("task.query", "empty", "@FILE")),
    "missing file": Case(
        ("task=prompt", "task.document=@{files}/nope.txt", "task.query=x"), ("task.document", "{files}/nope.txt", "@@")
    ),
    "folder as a file": Case(("task=prompt", "task.document=@{files}", "task.query=x"), ("is a directory",)),
    "not UTF-8": Case(
        ("task=prompt", "task.document=@{files}/latin.txt", "task.query=x"), ("latin.txt", "UTF-8", "byte 3")
    ),
    "UTF-16": Case(
        ("task=prompt", "task.document=@{files}/wide.txt", "task.query=x"), ("wide.txt", "NUL character", "UTF-8")
    ),
    "a forgotten @": Case(
        ("task=prompt", "task.document={files}/document.txt", "task.query=x"),
        ("task.document='{files}/document.txt' is a path", "task.document=@{files}/document.txt", '" {files}'),
    ),
    "a forgotten @ in a conversation": Case(
        ("task=chat", "task.document=x", "task.query=question.txt"), ("task.query='question.txt' is a path",)
    ),
    "a number in a config file": Case(
        ("task=prompt", "task.document=x", "+exp=number", "--config-dir={files}"),
        ("task.query=1.1 is a number", "quote it", 'query: "'),
    ),
    "nothing on standard input": Case(
        ("task=prompt", "task.document=-", "task.query=x"), ("task.document='-'", "empty")
    ),
    "both from standard input": Case(("task=prompt", "task.document=-", "task.query=-"), ("both -",)),
    "a conversation's document from standard input": Case(("task=chat", "task.document=-"), ("standard input",)),
    "a conversation without a question": Case(
        ("task=chat", "task.document=@{files}/document.txt"),
        ("no question", "standard input is empty", "task.query"),
        stdin="\n \n",
    ),
    # --- the chat template
    "a system prompt from standard input": Case((*PROMPT, "task.system=-"), ("task.system=-", "@FILE")),
    "a system prompt that is not there": Case(
        (*PROMPT, "task.system=@{files}/nope.txt"), ("task.system", "{files}/nope.txt")
    ),
    "a system prompt without its @": Case((*PROMPT, "task.system=sys.txt"), ("task.system='sys.txt'", "=@sys.txt")),
    "a system prompt that the template omits": Case(
        (*PROMPT, "model.tokenizer={files}/omits", "task.system=Be brief."), ("task.system has no effect", "leave out")
    ),
    "a template that needs a system prompt": Case(
        (*PROMPT, "model.tokenizer={files}/needs"), ("a system turn must come first", "task.system")
    ),
    "a template that fails": Case((*PROMPT, "model.tokenizer={files}/fails"), ("TypeError", "model.tokenizer")),
    "an argument that the template does not read": Case(
        (*PROMPT, "task.template={enable_thinking: false}"), ("task.template.enable_thinking", "no effect")
    ),
    "an argument that is not the template's": Case(
        (*PROMPT, "task.template={tokenize: true}"), ("task.template.tokenize", "leave it out")
    ),
    "arguments that are not a mapping": Case((*PROMPT, "task.template=thinking"), ("task.template='thinking'",)),
    # --- numbers
    "hosts no multiple of the ranks": Case(
        (*PROMPT, "method.hosts=3"), ("method.hosts=3", "multiple", "(2)", "method.hosts=4"), (2,)
    ),
    "a negative seed of the method": Case((*PROMPT, "method.seed=-1"), ("method.seed=-1", "at least 0"), early=True),
    "a negative seed": Case((*PROMPT, "seed=-1"), ("Error: seed=-1", "at least 0")),
    "more hosts than any document has tokens": Case(
        (*PROMPT, "method.hosts=1000000000"), ("method.hosts=1000000000", "at most 1000000"), early=True
    ),
    "no hosts": Case((*PROMPT, "method.hosts=0"), ("method.hosts=0", "at least 1"), early=True),
    "an anchor too short for the query": Case(
        (*PROMPT, "method.anchor_length=4"),
        ("method.anchor_length=4", "cannot hold the query", "method.query_position=2", "13", "15"),
    ),
    "a negative anchor": Case(
        (*PROMPT, "method.anchor_length=-1"), ("method.anchor_length=-1", "at least 0"), early=True
    ),
    "a fractional anchor": Case(
        (*PROMPT, "method.anchor_length=1.5"), ("method.anchor_length=1.5", "integer"), early=True
    ),
    "a negative passing length": Case(
        (*PROMPT, "method.passing_length=-2"), ("method.passing_length=-2", "at least 0"), early=True
    ),
    "a fractional passing length": Case(
        (*PROMPT, "method.passing_length=0.5"), ("method.passing_length=0.5", "integer"), early=True
    ),
    "a ratio below 1": Case(
        (*PROMPT, "method.compression_ratio=0.5"), ("method.compression_ratio=0.5", "at least 1"), early=True
    ),
    "ratio and length": Case(
        (*PROMPT, "method.compression_ratio=4", "method.passing_length=8"),
        ("method.passing_length=8", "method.compression_ratio=4", "one of them"),
        early=True,
    ),
    "no new tokens": Case((*PROMPT, "task.max_new_tokens=0"), ("task.max_new_tokens=0", "at least 1")),
    "temperature 0": Case((*PROMPT, "task.temperature=0"), ("task.temperature=0", "above 0", "leave it out")),
    "greedy with a temperature": Case(
        (*PROMPT, "task.do_sample=false", "task.temperature=0.7"), ("task.do_sample=false", "task.temperature=0.7")
    ),
    "top_p above 1": Case((*PROMPT, "task.top_p=1.5"), ("task.top_p=1.5", "[0, 1]")),
    # --- names
    "unknown compressor": Case(
        (*PROMPT, "method.compressor=windw"), ("method.compressor='windw'", "Did you mean 'window'?"), early=True
    ),
    "unknown kernel": Case(
        (*PROMPT, "method.kernel=cpu_flsh"), ("method.kernel='cpu_flsh'", "Did you mean 'cpu_flash'?"), early=True
    ),
    "unknown schedule": Case(
        (*PROMPT, "method.schedule=zigzak"), ("method.schedule='zigzak'", "Did you mean 'zigzag'?"), early=True
    ),
    "unknown method": Case(
        (*PROMPT, "method.method=abp"), ("method.method='abp'", "apb, star", "Did you mean 'apb'?"), early=True
    ),
    "unknown method file": Case(
        (*PROMPT, "method=starr"), ("method=starr", "apb, dense, ring, star", "Did you mean 'star'?"), composes=False
    ),
    "unknown exp": Case((*PROMPT, "+exp=llama_128"), ("exp=llama_128", "Did you mean 'llama_128k'?"), composes=False),
    "unknown task": Case(("task=promt",), ("task=promt", "Did you mean 'prompt'?"), composes=False),
    "a path as a model's name": Case(
        (*PROMPT, "model=/some/path"), ("model=/some/path", "model.path=/some/path"), composes=False
    ),
    "another task's setting": Case(
        ("task.document=foo",), ("task.document", "task=prompt", "task=chat"), composes=False
    ),
    "another command's setting": Case((*PROMPT, "eval.output=x"), ("eval", "launch/eval.py"), composes=False),
    "a key without its section": Case((*PROMPT, "hosts=4"), ("hosts", "'method.hosts'"), composes=False),
    "unknown key": Case((*PROMPT, "method.host=4"), ("host", "Did you mean 'hosts'?"), composes=False),
    "an interpolation that leads nowhere": Case(
        (*PROMPT, "task.query=${task.nothing}"), ("task.nothing", "not found"), composes=False
    ),
    "several values without -m": Case(
        (*PROMPT, "method.hosts=2,4"), ("method.hosts=2,4", "add -m", "[2,4]"), composes=False
    ),
    "a key outside ASCII": Case((*PROMPT, "task.qu\u00e9ry=1"), ("task.qu\u00e9ry", "'\u00e9'"), composes=False),
    "a mapping's key outside ASCII": Case(
        (*PROMPT, "model.overrides={\u00e9: 1}"),
        ("model.overrides", "{\u00e9: 1}", "'model.overrides=\"{\u00e9: 1}\"'"),
        composes=False,
    ),
    "an unknown flag": Case(
        (*PROMPT, "--hlep"), ("--hlep is not a flag", "Did you mean '--help'?", "--help lists"), composes=False
    ),
    "a value that the shell has cut": Case((*PROMPT, "signed"), ("'signed'", "key=value"), composes=False),
    "a kernel that is not installed": Case(
        (*PROMPT, "method.kernel=flash_attn2"), ("method.kernel='flash_attn2'", "pip install", "[flash]")
    ),
    # --- the model
    "too many positions": Case(
        (*PROMPT, "task.max_new_tokens=4096"),
        ("4096", "max_position_embeddings", "rope_parameters", "model.overrides"),
    ),
    "no such folder": Case((*PROMPT, "model.path={files}/nope"), ("model.path", "{files}/nope", "does not exist")),
    "no such hub id": Case((*PROMPT, "model.path=no/such"), ("model.path='no/such'", "Looked in", "hub cache")),
    "a folder without weights": Case((*PROMPT, "model.path={files}/weightless"), ("model.safetensors", "weightless")),
    "a corrupt GGUF": Case((*PROMPT, "model.path={files}/bad.gguf"), ("model.path", "bad.gguf", "damaged")),
    "a cut safetensors": Case((*PROMPT, "model.path={files}/cut"), ("model.path", "model.safetensors", "damaged")),
    "weights that do not fit": Case(
        (*PROMPT, "+model.overrides.num_hidden_layers=4"),
        ("missing keys", "do not fit"),
    ),
    "a tokenizer that does not match": Case(
        (*PROMPT, "model.tokenizer={files}/wide"), ("model.tokenizer", "859", "260")
    ),
    "an adapter for a model": Case(
        (*PROMPT, "model.path={files}/lora"), ("is an adapter", "model.adapter={files}/lora", "org/base")
    ),
    "weights without a place": Case(
        (*PROMPT, "model.path={files}/headed"), ("unexpected keys: v_head.weight", "model.ignore_keys")
    ),
    "a pattern that matches no weight": Case(
        (*PROMPT, "model.ignore_keys=[v_head.*]"), ("model.ignore_keys: 'v_head.*'", "leave it out")
    ),
    "two revisions": Case(
        (*PROMPT, "model.path=org/name@v1", "model.revision=v2"), ("model.revision='v2'", "'org/name@v1'")
    ),
    "a revision of a folder": Case((*PROMPT, "model.revision=v2"), ("model.revision='v2'", "{files}/good")),
    "a revision that is not there": Case(
        (*PROMPT, "model.path=org/name@v1"), ("model.path='org/name@v1'", "revision 'v1'", "--revision v1")
    ),
    "a geometry of real weights": Case(
        (*PROMPT, "model.geometry.num_hidden_layers=2"),
        ("model.geometry.num_hidden_layers", "load_format=dummy", "+model.overrides.num_hidden_layers"),
        composes=False,
    ),
    "another type of model": Case(
        (*PROMPT, "model.load_format=dummy", "model.geometry.model_type=qwen2"),
        ("model_type='qwen2'", "model.path=null"),
    ),
    # --- heads
    "a compressor without its heads": Case(
        (*PROMPT, "method.compressor=retaining_heads", "model.retaining_heads=null"),
        ("needs trained heads", "method.retaining_heads", "hub id"),
    ),
    "heads without their compressor": Case(
        (*PROMPT, "method.retaining_heads={files}/heads.pt"),
        (
            "method.retaining_heads=",
            "goes with method.compressor='heads_and_window' or 'retaining_heads', not 'window'",
        ),
    ),
    "heads that are not there": Case(
        (*PROMPT, "method.compressor=retaining_heads", "method.retaining_heads={files}/nope.pt"),
        ("retaining_heads=", "{files}/nope.pt", "does not exist"),
    ),
    "heads of another model": Case(
        (*PROMPT, "method.compressor=retaining_heads", "method.retaining_heads={files}/heads.pt"),
        ("model.layers.2.self_attn.fc1.weight is (24, 256), not (24, 128)", "4 heads and 2 KV heads of 16"),
    ),
    # --- batches
    "no input": Case(("task=batch",), ("task.input", "missing")),
    "an input that is not there": Case(("task=batch", "task.input={files}/nope.jsonl"), ("task.input", "nope.jsonl")),
    "a broken line": Case(("task=batch", "task.input={files}/broken.jsonl"), ("broken.jsonl", "line 2")),
    "a shared prefill and a compressor that wants the query": Case(
        ("task=batch", "task.input={files}/shared.jsonl", "method.compressor=query"),
        ("method.compressor=query", "lines 1 and 2", "task.reuse_prefill=false"),
    ),
    # --- memory
    "out of memory": Case(
        PROMPT,
        ("out of memory", "more hosts", "dtype", "2.00 GiB"),
        patches=("no memory for a round",),
    ),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A valid checkpoint, damaged ones, and texts."""
    directory = tmp_path_factory.mktemp("bad_input")
    text = "A lamp stands on the pier. It is lit at dusk and put out at dawn. " * 8
    (directory / "document.txt").write_text(text)
    (directory / "empty.txt").write_text(" \n")
    (directory / "wide.txt").write_bytes(text.encode("utf-16-le"))
    (directory / "exp").mkdir()
    (directory / "exp" / "number.yaml").write_text("# @package _global_\ntask:\n  query: 1.10\n")
    (directory / "latin.txt").write_bytes("caf\u00e9".encode("latin-1"))
    line = json.dumps({"id": 1, "document": text, "query": "What?"})
    (directory / "broken.jsonl").write_text(line + "\n{'id': 2}\n")
    other = json.dumps({"id": 2, "document": text, "query": "When?"})
    (directory / "shared.jsonl").write_text(line + "\n" + other + "\n")
    save_checkpoint(directory / "good")
    save_heads(directory / "heads.pt", random_checkpoint(build_model("qwen3")))
    save_checkpoint(directory / "wide", extra=600)
    for name, template in TEMPLATES.items():
        byte_tokenizer(template=template).save_pretrained(directory / name)
    cut = save_checkpoint(directory / "cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-1000])
    (save_checkpoint(directory / "weightless") / "model.safetensors").unlink()
    weights = save_checkpoint(directory / "headed") / "model.safetensors"
    save_file({**load_file(weights), "v_head.weight": torch.ones(1)}, weights, metadata={"format": "pt"})
    (directory / "lora").mkdir()
    (directory / "lora" / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "org/base"}))
    (directory / "bad.gguf").write_bytes(b"GGUF" + bytes(range(200)))
    return directory


def ask(pool: Pools, files: Path, run_dir: Path, case: Case, world_size: int) -> list[Ended]:
    overrides = [override.replace("{files}", str(files)) for override in case.overrides]
    defaults = [f"model.path={files}/good", "model.device=cpu", "method.hosts=4", f"hydra.run.dir={run_dir}"]
    named = {override.partition("=")[0] for override in overrides}
    arguments = [override for override in defaults if override.partition("=")[0] not in named]
    return pool(world_size).run(
        run_infer, [*arguments, *_last_of_each(overrides)], case.stdin, case.patches, timeout=120
    )


def _last_of_each(overrides: list[str]) -> list[str]:
    """Return the overrides with the last value of each key: Hydra refuses a key given twice for groups."""
    return list({override.partition("=")[0]: override for override in overrides}.values())


@pytest.mark.parametrize(
    ("name", "world_size"), [(name, size) for name, case in CASES.items() for size in case.world_sizes]
)
def test_bad_input(pool: Pools, files: Path, tmp_path: Path, name: str, world_size: int) -> None:
    case = CASES[name]
    ended = ask(pool, files, tmp_path / "run", case, world_size)
    said = ended[0].stderr
    for part in case.parts:
        assert part.replace("{files}", str(files)) in said, said
    assert [rank.code for rank in ended] == [FAILED] * world_size
    assert len(re.findall("^Error:", said, re.MULTILINE)) == 1 and "Traceback" not in said, said
    assert max(rank.seconds for rank in ended) < MAX_SECONDS
    if case.patches:
        return  # each rank reports its own failure
    assert all(rank.stderr == "" for rank in ended[1:]), "only the first rank prints"
    is_job = case.composes and not (case.early and world_size == 1)
    expected: Any = ended[0].errors if is_job else []
    assert [rank.errors for rank in ended] == [expected] * world_size
    if is_job:
        assert ended[0].errors[0] in said
        assert json.loads((tmp_path / "run" / "record.json").read_text())["error"] == hide_paths(
            ended[0].errors[0], tmp_path / "run"
        )


@pytest.mark.whole_weights("the log says what each rank holds")
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_same_without_a_fault_answers(pool: Pools, files: Path, tmp_path: Path, world_size: int) -> None:
    """The input is valid without the one change that each case makes."""
    ended = ask(pool, files, tmp_path / "run", Case((*PROMPT, "task.max_new_tokens=4"), ()), world_size)
    assert [rank.code for rank in ended] == [0] * world_size, ended[0].stderr
    assert "Answer: " in ended[0].stdout and ended[0].stderr == ""


def test_debug_shows_where_an_error_came_from(pool: Pools, files: Path, tmp_path: Path) -> None:
    for number, overrides in enumerate([(*PROMPT, "method.hosts=0"), (*PROMPT, "model.path={files}/cut")]):
        ended = ask(pool, files, tmp_path / str(number), Case((*overrides, "debug=true"), ()), 1)
        assert ended[0].code == FAILED and "Traceback" in ended[0].stderr, ended[0].stderr


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_sweep_over_bad_and_good_jobs(pool: Pools, files: Path, tmp_path: Path, world_size: int) -> None:
    overrides = [
        "-m",
        f"model.path={files}/good",
        "model.device=cpu",
        "task=prompt",
        f"task.document=@{files}/document.txt,@{files}/nope.txt",
        "task.query=What?",
        "task.max_new_tokens=2",
        "method.hosts=4",
        "method=apb,strr",
        f"hydra.sweep.dir={tmp_path}",
    ]
    ended = pool(world_size).run(run_infer, overrides, timeout=120)
    assert [rank.code for rank in ended] == [FAILED] * world_size
    assert [record["status"] for record in ended[0].records] == ["ok", "failed", "failed", "failed"]
    assert [rank.errors for rank in ended] == [ended[0].errors] * world_size
    lines = ended[0].stdout.splitlines()
    told = [line for line in lines if line.startswith("Job ") and " failed: " in line]
    assert len(told) == 3, ended[0].stdout
    assert "method=strr" in told[0] and "Did you mean 'star'?" in told[0]
    assert "nope.txt" in told[1] and "there is no file" in told[1]
    for number in range(4):
        run_dir = tmp_path / str(number)
        kept = json.loads((run_dir / "record.json").read_text())["error"]
        assert kept == hide_paths(ended[0].errors[number], run_dir)
