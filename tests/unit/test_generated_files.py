"""Generated files: whatever is read is valid, or a ValueError names the file that is not."""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import tests.generated  # noqa: F401 (registers the profiles)
from apb_ds.loading import ModelConfig, load_model
from apb_ds.report.answers import AnswerFile
from apb_ds.report.results import read_results
from apb_ds.tasks.lines import group_lines, read_document, read_lines
from tests.tiny_checkpoint import save_checkpoint, save_gguf

DEEP = "[" * 100_000
ODD_NUMBERS = st.sampled_from([0, -1, 1, 2, 7, 64, 1000, 0.5, 1e308, 2**63, -(2**63)])
SCALARS = st.one_of(
    st.none(), st.booleans(), ODD_NUMBERS, st.text(max_size=6), st.sampled_from(["llama", "F32", "</s>"])
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
)
# Values that JSON parsers struggle with, or accept although they are not JSON.
BROKEN = st.sampled_from(
    ["", "{", "nul", "NaN", '{"id": NaN}', DEEP, '{"a": ' + "1" * 5000 + "}", '"\\ud800"', "\x00", "{}{}"]
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("generated")


def refusal(read: Callable[[], Any], *names: object) -> str | None:
    """Return the message of the ValueError that reading raises, which names a file; None if it succeeds."""
    try:
        read()
    except ValueError as error:
        assert type(error) is ValueError, repr(error)
        assert any(str(name) in str(error) for name in names), str(error)
        return str(error)
    return None


# --- JSONL


def lines_of(keys: tuple[str, ...], good: dict[str, Any]) -> st.SearchStrategy[bytes]:
    """Return a strategy of JSONL files whose lines are mostly `good` with a key or two of them changed."""
    changed = st.dictionaries(st.sampled_from(keys), VALUES, max_size=2).map(lambda values: {**good, **values})
    dropped = st.sampled_from(keys).map(lambda key: {name: good[name] for name in good if name != key})
    line = st.one_of(changed.map(json.dumps), dropped.map(json.dumps), changed.map(json.dumps), BROKEN)
    text = st.lists(line, max_size=4).map(lambda parts: "\n".join(parts).encode("utf-8", "surrogatepass"))
    return st.one_of(
        text, text.map(lambda content: content + b"\n"), text.map(lambda content: content[:-5]), st.binary(max_size=60)
    )


QUESTION = {"id": "a", "query": "What?", "document": "A lamp."}


@given(content=lines_of(("id", "query", "document", "document_file", "max_new_tokens", "x"), QUESTION))
@example(content=b"\xef\xbb\xbf" + json.dumps(QUESTION).encode())
@example(content=json.dumps({**QUESTION, "document_file": "\x00", "document": None}).encode())
@example(content=json.dumps({**QUESTION, "document_file": "x" * 5000, "document": None}).encode())
@example(content=json.dumps({**QUESTION, "document_file": "\ud800", "document": None}).encode())
def test_questions(place: Path, content: bytes) -> None:
    file = place / "questions.jsonl"
    file.write_bytes(content)

    def read() -> None:
        lines = read_lines(file)
        assert lines and sum(map(len, group_lines(lines))) == len(lines)
        for line in lines:
            said = refusal(lambda line=line: read_document(file, line), file, line.document_path)  # type: ignore[misc]
            assert (said is None) == (line.document_digest is not None)

    refusal(read, file)


ANSWER = {"id": "a", "answer": "Dusk.", "fingerprint": "f", "line": 1}


@given(
    content=lines_of(("id", "answer", "error", "fingerprint"), ANSWER),
    kept=st.one_of(
        st.just(b'{"seed": 0}'),
        VALUES.map(lambda value: json.dumps(value).encode()),
        BROKEN.map(lambda text: text.encode("utf-8", "surrogatepass")),
        st.binary(max_size=20),
    ),
)
@example(content=json.dumps(ANSWER).encode() + b"\n", kept=DEEP.encode())
@example(content=json.dumps(ANSWER).encode() + b"\n", kept=b"\xff")
def test_answers_that_are_resumed(place: Path, content: bytes, kept: bytes) -> None:
    file = place / "answers" / "samples.jsonl"
    shutil.rmtree(file.parent, ignore_errors=True)
    file.parent.mkdir()
    file.write_bytes(content)
    (file.parent / "samples.jsonl.settings.json").write_bytes(kept)

    def resume() -> None:
        with AnswerFile(file, [("a", "f"), ("b", "g")], {"seed": 0}) as answers:
            left = [index for index in range(2) if index not in answers.kept]
            for index in left:
                answers.append(index, {"answer": "x"})
            answers.finish()
        assert [json.loads(line)["id"] for line in file.read_text().splitlines()] == ["a", "b"]

    if refusal(resume, file) is not None:
        assert file.read_bytes() == content, "a refused file stays unchanged"


SUMMARY = {"task": "passkey", "settings": {"method": {"method": "apb"}}, "all": {}, "cells": []}
SAMPLE = {"id": "a", "labels": {}, "fingerprint": "f", "answer": "x"}


@given(
    summary=st.one_of(
        st.dictionaries(st.sampled_from(["task", "settings", "all", "cells"]), VALUES, max_size=1).map(
            lambda values: json.dumps({**SUMMARY, **values})
        ),
        BROKEN,
    ),
    samples=lines_of(("labels", "fingerprint", "answer"), SAMPLE),
)
@example(summary=json.dumps(SUMMARY), samples=DEEP.encode())
@example(summary=DEEP, samples=b"")
@example(summary=json.dumps({**SUMMARY, "settings": True}), samples=b"")
def test_results_that_are_compared(place: Path, summary: str, samples: bytes) -> None:
    directory = place / "results"
    directory.mkdir(exist_ok=True)
    (directory / "summary.json").write_text(summary, encoding="utf-8", errors="surrogatepass")
    (directory / "samples.jsonl").write_bytes(samples)
    refusal(lambda: read_results([directory]), directory)


# --- models


def with_header(content: bytes, header: bytes) -> bytes:
    """Return a safetensors file with a different header."""
    length = int.from_bytes(content[:8], "little")
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


@st.composite
def changed_safetensors(draw: st.DrawFn, content: bytes) -> bytes:
    """Return a safetensors file whose header, or header length, is wrong."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    kind = draw(st.sampled_from(["field", "bytes", "length", "json", "swap"]))
    if kind == "length":
        return draw(st.integers(0, 2**64 - 1)).to_bytes(8, "little") + content[8:]
    if kind == "bytes":
        place, byte = draw(st.integers(0, 8 + length - 1)), draw(st.integers(0, 255))
        return content[:place] + bytes([byte]) + content[place + 1 :]
    if kind == "json":
        return with_header(content, draw(BROKEN).encode("utf-8", "surrogatepass"))
    names = [name for name in header if name != "__metadata__"]
    name, other = draw(st.sampled_from(names)), draw(st.sampled_from(names))
    changed = copy.deepcopy(header)
    if kind == "swap":
        changed[name], changed[other] = header[other], header[name]
    else:
        changed[name][draw(st.sampled_from(["dtype", "shape", "data_offsets", "x"]))] = draw(VALUES)
    return with_header(content, json.dumps(changed).encode())


@pytest.fixture(scope="module")
def good(place: Path) -> Path:
    return save_checkpoint(place / "good", num_hidden_layers=1)


@given(data=st.data())
def test_weights(good: Path, place: Path, data: st.DataObject) -> None:
    directory = shutil.copytree(good, place / "weights", dirs_exist_ok=True)
    content = (good / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(data.draw(changed_safetensors(content)))
    refusal(lambda: load_model(ModelConfig(path=str(directory), device="cpu")), directory)


@given(data=st.data())
def test_config(good: Path, place: Path, data: st.DataObject) -> None:
    directory = shutil.copytree(good, place / "config", dirs_exist_ok=True)
    values = json.loads((good / "config.json").read_text())
    changes = st.dictionaries(st.sampled_from(sorted(values)), VALUES, min_size=1, max_size=2)
    content = data.draw(st.one_of(changes.map(lambda changed: json.dumps({**values, **changed})), BROKEN))
    (directory / "config.json").write_text(content, encoding="utf-8", errors="surrogatepass")
    refusal(lambda: load_model(ModelConfig(path=str(directory), device="cpu")), directory)


@given(data=st.data())
def test_tokenizer(good: Path, place: Path, data: st.DataObject) -> None:
    directory = shutil.copytree(good, place / "tokenizer", dirs_exist_ok=True)
    name = data.draw(st.sampled_from(["tokenizer.json", "tokenizer_config.json"]))
    values = json.loads((good / name).read_text())
    changes = st.dictionaries(st.sampled_from(sorted(values)), VALUES, min_size=1, max_size=1)
    content = data.draw(st.one_of(changes.map(lambda changed: json.dumps({**values, **changed})), BROKEN))
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(good / file, directory / file)
    (directory / name).write_text(content, encoding="utf-8", errors="surrogatepass")
    refusal(lambda: load_model(ModelConfig(path=str(directory), device="cpu")), directory)


@given(data=st.data())
def test_gguf(place: Path, data: st.DataObject) -> None:
    pytest.importorskip("gguf")
    source = place / "tiny.gguf"
    content = source.read_bytes() if source.is_file() else save_gguf(source).read_bytes()
    file = place / "changed.gguf"
    changed = bytearray(content)
    for _ in range(data.draw(st.integers(1, 3))):
        # Magic, version and counts, then fields; the vocabulary's many strings follow.
        place_in = data.draw(st.one_of(st.integers(0, 23), st.integers(24, 600), st.integers(0, 9000)))
        changed[place_in] = data.draw(st.one_of(st.sampled_from([0, 1, 127, 128, 255]), st.integers(0, 255)))
    file.write_bytes(changed)
    with mock.patch.dict("os.environ", {"APB_DS_CACHE": str(place / "cache")}):
        refusal(lambda: load_model(ModelConfig(path=str(file), device="cpu")), file)
    shutil.rmtree(place / "cache", ignore_errors=True)


@pytest.fixture(scope="module")
def good_adapter(good: Path, place: Path) -> Path:
    peft = pytest.importorskip("peft")
    loaded = load_model(ModelConfig(path=str(good), device="cpu"))
    adapted = peft.get_peft_model(loaded.model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    adapted.save_pretrained(place / "good_adapter")
    return place / "good_adapter"


@given(data=st.data())
def test_adapter(good: Path, good_adapter: Path, place: Path, data: st.DataObject) -> None:
    directory = shutil.copytree(good_adapter, place / "adapter", dirs_exist_ok=True)
    if data.draw(st.booleans()):
        content = (good_adapter / "adapter_model.safetensors").read_bytes()
        (directory / "adapter_model.safetensors").write_bytes(data.draw(changed_safetensors(content)))
    else:
        values = json.loads((good_adapter / "adapter_config.json").read_text())
        changes = st.dictionaries(st.sampled_from(sorted(values)), VALUES, min_size=1, max_size=2)
        text = data.draw(st.one_of(changes.map(lambda changed: json.dumps({**values, **changed})), BROKEN))
        (directory / "adapter_config.json").write_text(text, encoding="utf-8", errors="surrogatepass")
    refusal(
        lambda: load_model(ModelConfig(path=str(good), device="cpu", adapter=str(directory))),
        directory,
        "model.adapter",
    )
