"""Prompts, conversations and batches through the launch script, on one and two ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import apb_ds
from apb_ds.engine import packs
from tests.launch_in_process import INTERRUPTED, Ended, run_infer
from tests.pool import Pools
from tests.tiny_checkpoint import TEMPLATE, byte_tokenizer, save_checkpoint

DOCUMENT = "A lamp stands on the pier. It is lit at dusk and put out at dawn. " * 8
OTHER = "Trams leave the square every ten minutes, and every five on market days. " * 6
QUESTIONS = ("Where is the lamp?", "When is it lit?", "And put out?")
HOSTS = 4
NEW_TOKENS = 6
SIZES = pytest.mark.parametrize("world_size", [1, 2])
FIRST_ONLY = ("text on the first rank only",)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("tasks") / "model")


class Library:
    """The same answers done by hand: ids made here and passed to an engine."""

    def __init__(self, path: Path) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        # Two header tokens precede the user's text in this template: <s> and <|user|>.
        self.engine = apb_ds.init_inference(model, apb_ds.APBConfig(hosts=HOSTS, query_position=2))

    def ids(self, text: str) -> torch.Tensor:
        return self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids

    def document(self, text: str) -> torch.Tensor:
        return self.ids(f"<s><|user|>{text}</s>")

    def query(self, text: str) -> torch.Tensor:
        return self.ids(f"<|user|>{text}</s><|assistant|>")

    def embedded(self, text: str) -> torch.Tensor:
        """Return what the anchor embeds: the query without what closes the turn and opens the answer."""
        return self.ids(f"{text}\n\n")

    def text(self, tokens: torch.Tensor) -> str:
        return self.tokenizer.decode(tokens[0], skip_special_tokens=True).strip()

    def ask(self, document: str, question: str, **arguments: Any) -> str:
        arguments = {"do_sample": False, "max_new_tokens": NEW_TOKENS, **arguments}
        context = self.engine.prefill(self.document(document), self.embedded(question))
        return self.text(self.engine.generate(query_ids=self.query(question), context=context, **arguments))

    def ask_all(self, document: str, questions: tuple[str, ...]) -> list[str]:
        context = self.engine.prefill(self.document(document))
        arguments = {"do_sample": False, "max_new_tokens": NEW_TOKENS}
        return [
            self.text(self.engine.generate(query_ids=self.query(text), context=context, **arguments))
            for text in questions
        ]


@pytest.fixture(scope="module")
def library(model_path: Path) -> Library:
    return Library(model_path)


def infer(
    pool: Pools,
    world_size: int,
    model_path: Path,
    *overrides: str,
    stdin: str | bytes = "",
    patches: tuple[str, ...] = (),
) -> list[Ended]:
    arguments = [
        f"model.path={model_path}",
        "model.device=cpu",
        f"method.hosts={HOSTS}",
        f"task.max_new_tokens={NEW_TOKENS}",
        *overrides,
    ]
    ended = pool(world_size).run(run_infer, arguments, stdin, patches, timeout=120)
    assert all(rank.stdout == "" for rank in ended[1:]), "only the first rank prints"
    return ended


# --- one question -----------------------------------------------------------------------------------------------------


@SIZES
@pytest.mark.parametrize("stream", ["true", "false"])
@pytest.mark.parametrize("source", ["text", "file", "standard input"])
def test_a_prompt(
    pool: Pools, library: Library, model_path: Path, tmp_path: Path, world_size: int, stream: str, source: str
) -> None:
    (tmp_path / "document.txt").write_text(DOCUMENT)
    given = {"text": f"'{DOCUMENT}'", "file": f"@{tmp_path}/document.txt", "standard input": "-"}[source]
    ended = infer(
        pool,
        world_size,
        model_path,
        "task=prompt",
        f"task.document={given}",
        f"task.query={QUESTIONS[0]}",
        f"task.stream={stream}",
        f"hydra.run.dir={tmp_path}/run",
        stdin=DOCUMENT if source == "standard input" else "",
        patches=FIRST_ONLY,
    )
    assert [rank.code for rank in ended] == [0] * world_size, ended[0].stderr
    expected = library.ask(DOCUMENT, QUESTIONS[0])
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["task"]["prediction"] == expected and expected
    assert record["task"]["query_position"] == 2
    assert ended[0].stdout.count("Answer: ") == 1
    assert ended[0].stdout.startswith(f"Answer: {expected}"), ended[0].stdout


# Needs a system prompt, and has an argument.
CHAT_TEMPLATE = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('no system prompt') }}{% endif %}"
    + TEMPLATE.replace("'<|assistant|>' }}", "'<|assistant|>' + ('' if enable_thinking else 'At once: ') }}")
)


@SIZES
@pytest.mark.parametrize("task", ["prompt", "chat", "batch"])
def test_a_system_prompt_and_arguments_of_the_template(
    pool: Pools, model_path: Path, tmp_path: Path, world_size: int, task: str
) -> None:
    tokenizer = byte_tokenizer(template=CHAT_TEMPLATE)
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    (tmp_path / "system.txt").write_text("Answer in one word.")
    (tmp_path / "in.jsonl").write_text(json.dumps({"id": 1, "document": DOCUMENT, "query": QUESTIONS[0]}))
    given = [f"task.document={DOCUMENT}", f"task.query={QUESTIONS[0]}"]
    ended = infer(
        pool,
        world_size,
        model_path,
        f"model.tokenizer={tmp_path}/tokenizer",
        f"task={task}",
        *([f"task.input={tmp_path}/in.jsonl"] if task == "batch" else given),
        f"task.system=@{tmp_path}/system.txt",
        "task.template={enable_thinking: false}",
        f"hydra.run.dir={tmp_path}/run",
        patches=FIRST_ONLY,
    )
    assert [rank.code for rank in ended] == [0] * world_size, ended[0].stderr
    system, template = "Answer in one word.", {"enable_thinking": False}
    chat = apb_ds.encode_chat(tokenizer, DOCUMENT, QUESTIONS[0], system=system, template=template)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    engine = apb_ds.init_inference(model, apb_ds.APBConfig(hosts=HOSTS, query_position=chat.query_position))
    context = engine.prefill(chat.document_ids, chat.embedded_ids)
    tokens = engine.generate(query_ids=chat.query_ids, context=context, max_new_tokens=NEW_TOKENS, do_sample=False)
    expected = tokenizer.decode(tokens[0], skip_special_tokens=True).strip()
    if task == "batch":
        found = json.loads((tmp_path / "in.answers.jsonl").read_text())["answer"]
    else:
        done = json.loads((tmp_path / "run" / "record.json").read_text())["task"]
        found = done["prediction"] if task == "prompt" else done["turns"][0]["answer"]
    assert found == expected and expected


@SIZES
def test_sampling_repeats_with_its_seed(pool: Pools, model_path: Path, tmp_path: Path, world_size: int) -> None:
    def draw(seed: int) -> str:
        overrides = ("task.temperature=1.5", f"seed={seed}", f"hydra.run.dir={tmp_path}/run", "task.max_new_tokens=24")
        text = ("task=prompt", f"task.document='{DOCUMENT}'", "task.query=What?")
        arguments = [f"model.path={model_path}", "model.device=cpu", f"method.hosts={HOSTS}", *text, *overrides]
        return pool(world_size).run(run_infer, arguments)[0].records[0]["task"]["prediction"]

    first = draw(1)
    assert draw(1) == first
    assert draw(2) != first


def test_methods_side_by_side(pool: Pools, model_path: Path, tmp_path: Path) -> None:
    """One sweep over the methods: the exact ones agree, and dense says why it cannot use two ranks."""
    overrides = ("-m", "task=prompt", f"task.document='{DOCUMENT}'", f"task.query={QUESTIONS[0]}", "seed=3")
    arguments = [f"model.path={model_path}", "model.device=cpu", f"task.max_new_tokens={NEW_TOKENS}", *overrides]

    def run(world_size: int, methods: str) -> list[dict[str, Any]]:
        sweep = f"hydra.sweep.dir={tmp_path}/{world_size}"
        return pool(world_size).run(run_infer, [*arguments, f"method={methods}", sweep], timeout=120)[0].records

    (dense,) = [record["task"]["prediction"] for record in run(1, "dense")]
    records = run(2, "ring,dense,ulysses,apb")
    assert [record["status"] for record in records] == ["ok", "failed", "ok", "ok"]
    assert "method=dense runs on one rank" in records[1]["error"]
    assert records[0]["task"]["prediction"] == records[2]["task"]["prediction"] == dense
    assert [record["exact"] for record in records if record["status"] == "ok"] == [True, True, False]


# --- a conversation ---------------------------------------------------------------------------------------------------


def conversation(
    library: Library, questions: tuple[str, ...], query: torch.Tensor | None = None, first_tokens: int = NEW_TOKENS
) -> list[str]:
    """Return the answers of one conversation, turn after turn; the first one's length can differ."""
    context = library.engine.prefill(library.document(DOCUMENT), query)
    answers, end = [], library.tokenizer.eos_token_id
    last = None
    for place, text in enumerate(questions):
        ids = library.query(text)
        length = NEW_TOKENS if place else first_tokens
        if last is not None and last != end:  # the answer was cut short: the template closes it
            ids = torch.cat([torch.tensor([[end]]), ids], dim=1)
        tokens = library.engine.generate(
            query_ids=ids, context=context, append=True, do_sample=False, max_new_tokens=length
        )
        last = int(tokens[0, -1])
        answers.append(library.text(tokens))
    return answers


@SIZES
def test_a_conversation(pool: Pools, library: Library, model_path: Path, tmp_path: Path, world_size: int) -> None:
    ended = infer(
        pool,
        world_size,
        model_path,
        "task=chat",
        f"task.document='{DOCUMENT}'",
        f"hydra.run.dir={tmp_path}",
        stdin="\n".join((QUESTIONS[0], "", *QUESTIONS[1:])),
        patches=(*FIRST_ONLY, "slow questions"),
    )
    assert [rank.code for rank in ended] == [0] * world_size, ended[0].stderr
    turns = ended[0].records[0]["task"]["turns"]
    assert [turn["question"] for turn in turns] == list(QUESTIONS)
    assert [turn["answer"] for turn in turns] == conversation(library, QUESTIONS)
    assert ended[0].records[0]["metrics"]["turns"] == 3
    for turn in turns:  # a streamed answer includes white space at its ends
        assert turn["answer"] in ended[0].stdout.split(f"> {turn['question']}\n")[1].split("\n> ")[0]
    others = ended[-1].records[0]["task"]["turns"]
    assert [turn["answer"] for turn in others] == [turn["answer"] for turn in turns]


@SIZES
def test_a_first_question_is_embedded_in_the_anchor(
    pool: Pools, library: Library, model_path: Path, tmp_path: Path, world_size: int
) -> None:
    overrides = ("task=chat", f"task.document='{DOCUMENT}'", f"hydra.run.dir={tmp_path}", "method.compressor=query")
    refused = infer(pool, world_size, model_path, *overrides, stdin=QUESTIONS[1])
    assert refused[0].code == 2 and "give the first question as task.query" in refused[0].stderr
    overrides = (*overrides[:3], f"task.query={QUESTIONS[0]}", "task.stream=false")
    ended = infer(pool, world_size, model_path, *overrides, stdin=QUESTIONS[1])
    answers = [turn["answer"] for turn in ended[0].records[0]["task"]["turns"]]
    assert answers == conversation(library, QUESTIONS[:2], library.embedded(QUESTIONS[0]))
    assert answers[0] == library.ask(DOCUMENT, QUESTIONS[0])


@pytest.mark.whole_weights("the log says what each rank holds")
@SIZES
def test_a_failed_turn_leaves_the_conversation_unchanged(
    pool: Pools, library: Library, model_path: Path, tmp_path: Path, world_size: int
) -> None:
    too_long = "why " * 1500
    ended = infer(
        pool,
        world_size,
        model_path,
        "task=chat",
        f"task.document='{DOCUMENT}'",
        f"hydra.run.dir={tmp_path}",
        stdin="\n".join((QUESTIONS[0], too_long, QUESTIONS[1])),
    )
    turns = ended[0].records[0]["task"]["turns"]
    assert [turn["answer"] for turn in turns if turn["answer"] is not None] == conversation(library, QUESTIONS[:2])
    assert turns[1]["answer"] is None and "max_position_embeddings" in turns[1]["error"]
    assert ended[0].stderr.startswith("Error: ") and "positions" in ended[0].stderr
    assert "1 of 3 turns failed: " in ended[0].records[0]["error"]
    assert [rank.code for rank in ended] == [2] * world_size


@SIZES
def test_ctrl_c_stops_an_answer_and_keeps_the_conversation(
    pool: Pools, library: Library, model_path: Path, tmp_path: Path, world_size: int
) -> None:
    overrides = ("task=chat", f"task.document='{DOCUMENT}'", f"hydra.run.dir={tmp_path}")
    stdin = "\n".join(QUESTIONS)
    ended = infer(pool, world_size, model_path, *overrides, stdin=stdin, patches=("Ctrl-C during an answer",))
    assert [rank.code for rank in ended] == [0] * world_size, ended[0].stderr
    for rank in ended:
        turns = rank.records[0]["task"]["turns"]
        assert [turn["answer"] for turn in turns] == conversation(library, QUESTIONS, first_tokens=3)
        assert [turn["stopped"] for turn in turns] == [True, False, False]


@pytest.mark.parametrize(("patch", "kept"), [("Ctrl-C twice", 0), ("Ctrl-C at the prompt", 1)])
def test_ctrl_c_that_ends_a_conversation_leaves_its_record(
    pool: Pools, library: Library, model_path: Path, tmp_path: Path, patch: str, kept: int
) -> None:
    overrides = ("task=chat", f"task.document='{DOCUMENT}'", f"hydra.run.dir={tmp_path}")
    (ended,) = infer(pool, 1, model_path, *overrides, stdin="\n".join(QUESTIONS), patches=(patch,))
    assert ended.code == INTERRUPTED and ended.stderr.endswith("Interrupted.\n"), ended.stderr
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["status"] == "failed" and "Ctrl-C" in record["error"]
    assert [turn["answer"] for turn in record["task"]["turns"]] == conversation(library, QUESTIONS[:kept])


@SIZES
def test_a_line_that_is_no_text_fails_its_turn_only(
    pool: Pools, library: Library, model_path: Path, tmp_path: Path, world_size: int
) -> None:
    overrides = ("task=chat", f"task.document='{DOCUMENT}'", f"hydra.run.dir={tmp_path}")
    stdin = "\n".join(("\ufeff" + QUESTIONS[0], "caf\xe9", "a\0b", QUESTIONS[1])).encode().replace(b"\xc3", b"")
    ended = infer(pool, world_size, model_path, *overrides, stdin=stdin)
    for rank in ended:
        turns = rank.records[0]["task"]["turns"]
        assert [turn["answer"] for turn in turns if turn["answer"] is not None] == conversation(library, QUESTIONS[:2])
        assert turns[1]["question"] == r"caf\xa9"
        assert "not UTF-8: byte 0xa9 at character 3" in turns[1]["error"] and "NUL character" in turns[2]["error"]
    assert "2 of 4 turns failed: " in ended[0].records[0]["error"]
    assert [rank.code for rank in ended] == [2] * world_size


# --- a batch ----------------------------------------------------------------------------------------------------------


def write_lines(path: Path, *lines: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def batch_lines() -> list[dict[str, Any]]:
    """Two questions about one document, one that fails, two about another, one by itself."""
    return [
        {"id": "a", "document_file": "pier.txt", "query": QUESTIONS[0]},
        {"id": "b", "document_file": "pier.txt", "query": QUESTIONS[1]},
        {"id": "c", "document_file": "nowhere.txt", "query": "What?"},
        {"id": "d", "document": OTHER, "query": "How often?"},
        {"id": "e", "document": OTHER, "query": "And on market days?"},
        {"id": 6, "document": DOCUMENT, "query": QUESTIONS[2], "max_new_tokens": 3},
    ]


@pytest.fixture
def batch_input(tmp_path: Path) -> Path:
    (tmp_path / "pier.txt").write_text(DOCUMENT)
    return write_lines(tmp_path / "questions.jsonl", *batch_lines())


def results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def expected_answers(library: Library) -> list[str | None]:
    pier = library.ask_all(DOCUMENT, QUESTIONS[:2])
    trams = library.ask_all(OTHER, ("How often?", "And on market days?"))
    return [*pier, None, *trams, library.ask(DOCUMENT, QUESTIONS[2], max_new_tokens=3)]


@SIZES
def test_a_batch(pool: Pools, library: Library, model_path: Path, batch_input: Path, world_size: int) -> None:
    run_dir = f"hydra.run.dir={batch_input.parent}/run"
    ended = infer(pool, world_size, model_path, "task=batch", f"task.input={batch_input}", run_dir, patches=FIRST_ONLY)
    output = batch_input.with_name("questions.answers.jsonl")
    found = results(output)
    assert [result["id"] for result in found] == ["a", "b", "c", "d", "e", 6]
    assert [result.get("answer") for result in found] == expected_answers(library)
    assert "nowhere.txt" in found[2]["error"]
    assert [result["new_tokens"] for result in found if "answer" in result][-1] <= 3
    for result in found:
        if "answer" in result:
            assert result["seconds"] >= result["query_s"] > 0 and result["document_tokens"] > 400
    assert [result["prefill_s"] > 0 for result in found if "answer" in result] == [True, False, True, False, True]
    # One line failed, so the job failed, but all other lines were answered.
    assert [rank.code for rank in ended] == [2] * world_size
    assert "1 of 6 lines failed: line 3 (id c)" in ended[0].stderr
    metrics = ended[0].records[0]["metrics"]
    assert (metrics["prefills"], metrics["answered"], metrics["failed"]) == (3, 5, 1)
    assert f"Answers: {output}" in ended[0].stdout and "6/6 lines, 1 failed" in ended[0].stderr


@SIZES
def test_each_line_with_its_own_prefill(
    pool: Pools, library: Library, model_path: Path, batch_input: Path, world_size: int
) -> None:
    overrides = ("task=batch", f"task.input={batch_input}", f"hydra.run.dir={batch_input.parent}/run")
    infer(pool, world_size, model_path, *overrides, "task.reuse_prefill=false")
    found = results(batch_input.with_name("questions.answers.jsonl"))
    assert [result.get("answer") for result in found[:2]] == [library.ask(DOCUMENT, text) for text in QUESTIONS[:2]]
    assert all(result["prefill_s"] > 0 for result in found if "answer" in result)


@SIZES
@pytest.mark.parametrize("reuse", ["true", "false"])
def test_lines_that_decode_together_are_answered_as_one_by_one(
    pool: Pools, model_path: Path, batch_input: Path, world_size: int, reuse: str
) -> None:
    """Of one document or several, sampled; one of them does not fit, and another has no document."""
    lines = batch_lines()
    lines[1:1] = [{"id": "long", "document_file": "pier.txt", "query": "why " * 1500}]
    write_lines(batch_input, *lines)
    answers = {}
    for sequences in (1, 2, 5):
        output = batch_input.with_name(f"{sequences}.jsonl")
        overrides = ("task=batch", f"task.input={batch_input}", f"task.output={output}", "task.temperature=1.5")
        overrides += (f"task.reuse_prefill={reuse}", f"task.sequences={sequences}")
        ended = infer(pool, world_size, model_path, *overrides, f"hydra.run.dir={batch_input.parent}/run")
        found = results(output)
        assert [result["id"] for result in found] == ["a", "long", "b", "c", "d", "e", 6], "the input's order"
        assert "max_position_embeddings" in found[1]["error"] and "nowhere.txt" in found[3]["error"]
        answers[sequences] = [result.get("answer") for result in found]
        metrics, timed = ended[0].records[0]["metrics"], [result for result in found if "answer" in result]
        decode_s = sum(result["decode_s"] for result in timed)
        if sequences == 1:
            assert metrics["decode_s"] == pytest.approx(decode_s, abs=1e-3)
        else:  # a step counts once in the record, and for each line that shared it
            assert metrics["decode_s"] < 0.8 * decode_s
        num_steps = sum(result["new_tokens"] - 1 for result in timed)
        assert metrics["decode_tokens_per_s"] == pytest.approx(num_steps / metrics["decode_s"])
    assert answers[1] == answers[2] == answers[5] and len(set(answers[1])) == 6


def test_lines_share_forwards(model_path: Path, batch_input: Path) -> None:
    """At most `task.sequences` in one, and about two documents at a time."""
    members: list[tuple[int, int]] = []
    run_pack = packs.run_pack

    def recorded(engine: Any, sequences: Any, **options: Any) -> Any:
        members.append((len(sequences), len({id(one.prefix) for one in sequences})))
        return run_pack(engine, sequences, **options)

    with mock.patch("apb_ds.engine.batch.run_pack", recorded):
        arguments = [f"model.path={model_path}", "model.device=cpu", f"method.hosts={HOSTS}", "task=batch"]
        arguments += [f"task.input={batch_input}", "task.max_new_tokens=4", "task.sequences=4"]
        ended = run_infer(0, 1, [*arguments, f"hydra.run.dir={batch_input.parent}/run"])
    assert "1 of 6 lines failed" in ended.stderr
    assert max(members) == (4, 2)


@SIZES
@pytest.mark.parametrize("sequences", [1, 4])
@pytest.mark.parametrize("sampled", [False, True])
def test_a_stopped_batch_is_resumed(
    pool: Pools, model_path: Path, batch_input: Path, world_size: int, sampled: bool, sequences: int
) -> None:
    """Stopped at the third answer, which ends together with the others where they share steps.

    The first two are kept, and the others are as without the stop.
    """
    output = batch_input.with_name("questions.answers.jsonl")
    overrides = ["task=batch", f"task.input={batch_input}", f"hydra.run.dir={batch_input.parent}/run"]
    overrides += ["task.temperature=1.5"] if sampled else []
    overrides += [f"task.sequences={sequences}"]

    def run(*more: str, patches: tuple[str, ...] = ()) -> list[Ended]:
        return infer(pool, world_size, model_path, *overrides, *more, patches=patches)

    run(f"task.output={batch_input.parent}/whole.jsonl")
    stopped = run(patches=("interrupted at the third line",))
    assert [rank.code for rank in stopped] == [INTERRUPTED] * world_size
    before = [result for result in results(output) if "answer" in result]
    assert [result["id"] for result in before] == ["a", "b"]
    ended = run("task.sequences=3")  # may be changed
    assert ended[0].records[0]["metrics"]["resumed"] == 2
    assert ended[0].records[0]["metrics"]["prefills"] == 2, "the first document is not prefilled again"
    assert results(output)[:2] == before

    def answers(path: Path) -> list[Any]:
        return [(result["id"], result.get("answer")) for result in results(path)]

    assert answers(output) == answers(batch_input.parent / "whole.jsonl")
    # What failed is retried, and its answer is put in order.
    (batch_input.parent / "nowhere.txt").write_text(OTHER)
    ended = run()
    assert [rank.code for rank in ended] == [0] * world_size, ended[0].stderr
    assert ended[0].records[0]["metrics"]["answered"] == 1
    assert [identity for identity, answer in answers(output) if answer is not None] == ["a", "b", "c", "d", "e", 6]


@SIZES
def test_answers_of_other_settings_are_left_alone(
    pool: Pools, model_path: Path, batch_input: Path, world_size: int
) -> None:
    output = batch_input.with_name("questions.answers.jsonl")
    system = batch_input.with_name("system.txt")
    system.write_text("Be brief.")
    overrides = ("task=batch", f"task.input={batch_input}", f"hydra.run.dir={batch_input.parent}/run")
    overrides += (f"task.system=@{system}",)
    infer(pool, world_size, model_path, *overrides)
    before = output.read_text()
    system.write_text("Be polite.")
    ended = infer(pool, world_size, model_path, *overrides)
    assert [rank.code for rank in ended] == [2] * world_size and "task.system" in ended[0].stderr, ended[0].stderr
    system.write_text("Be brief.")
    ended = infer(pool, world_size, model_path, *overrides, "method.compressor=knorm")
    assert [rank.code for rank in ended] == [2] * world_size
    for part in ("method.compressor", "knorm", "window", "task.overwrite=true"):
        assert part in ended[0].stderr, ended[0].stderr
    assert output.read_text() == before
    # The schedule does not change the answers.
    ended = infer(pool, world_size, model_path, *overrides, "method.schedule=natural")
    assert ended[0].records[0]["metrics"]["resumed"] == 5
    ended = infer(pool, world_size, model_path, *overrides, "method.compressor=knorm", "task.overwrite=true")
    assert ended[0].records[0]["metrics"]["resumed"] == 0
    assert output.with_name(output.name + ".bak").read_text() == before


@SIZES
def test_a_line_that_does_not_fit_is_reported_in_order(
    pool: Pools, model_path: Path, tmp_path: Path, world_size: int
) -> None:
    lines = [
        {"id": 1, "document": DOCUMENT, "query": "why " * 1500},
        {"id": 2, "document": DOCUMENT, "query": " "},
        {"id": 3, "document": DOCUMENT, "query": QUESTIONS[0]},
        {"id": 4, "document": "w " * 3000, "query": QUESTIONS[0]},
        {"id": 5, "document": OTHER, "query": "How often?"},
    ]
    path = write_lines(tmp_path / "in.jsonl", *lines)
    ended = infer(pool, world_size, model_path, "task=batch", f"task.input={path}", f"hydra.run.dir={tmp_path}/run")
    found = results(tmp_path / "in.answers.jsonl")
    assert [result["id"] for result in found] == [1, 2, 3, 4, 5]
    assert ["answer" in result for result in found] == [False, False, True, False, True]
    for index in (0, 3):
        assert "max_position_embeddings=4096" in found[index]["error"]
    assert "query" in found[1]["error"] and "3 of 5 lines failed" in ended[0].stderr


@SIZES
def test_batches_of_a_sweep_have_separate_answers(
    pool: Pools, model_path: Path, batch_input: Path, world_size: int
) -> None:
    overrides = ("-m", "task=batch", f"task.input={batch_input}", "method.compressor=window,knorm")
    sweep = batch_input.parent / "sweep"
    ended = infer(pool, world_size, model_path, *overrides, f"hydra.sweep.dir={sweep}")
    for number in range(2):
        assert len(results(sweep / str(number) / "answers.jsonl")) == 6
    assert not batch_input.with_name("questions.answers.jsonl").exists()
    rows = [line.split() for line in ended[0].stdout.splitlines() if "5/6" in line]
    assert [row[1] for row in rows] == ["window", "knorm"] and all(row[-1] == "failed" for row in rows)


def test_ranks_return_the_same_objective(pool: Pools, model_path: Path, tmp_path: Path) -> None:
    """The first rank's number: sweepers that saw different ones would ask for different jobs."""
    prompt = ("task=prompt", f"task.document='{DOCUMENT}'", f"task.query={QUESTIONS[0]}", "task.max_new_tokens=2")
    common = ("-m", f"model.path={model_path}", "model.device=cpu", f"hydra.sweep.dir={tmp_path}")
    arguments = [*common, *prompt, "objective=metrics.query_s"]
    ended = pool(2).run(run_infer, arguments, "", ("an optimizing sweeper",), timeout=120)
    assert [rank.code for rank in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    expected = [record["metrics"]["query_s"] for record in ended[0].records]
    for number, rank in enumerate(ended):
        assert f"returned on rank {number}: {expected}" in rank.stderr


def test_the_jobs_of_a_sweep_share_standard_input(
    pool: Pools, library: Library, model_path: Path, tmp_path: Path
) -> None:
    overrides = ("-m", "task=prompt", "task.document=-", f"task.query={QUESTIONS[0]},{QUESTIONS[1]}")
    ended = infer(pool, 1, model_path, *overrides, f"hydra.sweep.dir={tmp_path}", stdin=DOCUMENT)
    answers = [record["task"]["prediction"] for record in ended[0].records]
    assert answers == [library.ask(DOCUMENT, text) for text in QUESTIONS[:2]]
