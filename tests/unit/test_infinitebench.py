"""InfiniteBench: rows read and checked, prompts split and cut, answers scored by the benchmark's rules."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from apb_ds.tasks import InfiniteBenchConfig, Sample, build_task_config
from apb_ds.tasks.infinitebench.names import ANSWER_TOKENS, TASKS
from apb_ds.tasks.infinitebench.scoring import score
from tests.tiny_checkpoint import byte_tokenizer

needs_rouge = pytest.mark.skipif(
    importlib.util.find_spec("rouge_score") is None, reason="missing: rouge_score (pip install -e '.[eval]')"
)
OPTIONS = ["load", "save", "send_all", "close"]
LISTED = "A. load\nB. save\nC. send_all\nD. close"
CALC_LEAD = (
    "Let us calculate the intermediate values of an expression.\n\nExpression: 1 + 3 + 4\nValues: [1, 4, 8]\n\n"
    "Expression: 8 - 3 + 2 - 4\nValues: [8, 5, 7, 3]\n\nExpression: "
)
# For each task: a row without id and context, the instruction before the context, the text after it for a model without
# a chat template, and a chat's question and cue.
CASES: dict[str, tuple[dict[str, Any], str, str, str, str]] = {
    "passkey": (
        {"input": "What is the pass key?", "answer": ["71432"]},
        "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you "
        "about the important information.\n\n",
        "\n\nWhat is the pass key?\n\nThe pass key is",
        "What is the pass key?",
        "The pass key is",
    ),
    "number_string": (
        {"input": "What is the sequence of digits?", "answer": ["7711443322"]},
        "There is an important info hidden inside a lot of irrelevant text. Find it. I will quiz you about the "
        "important information there.\n\n",
        "\n\nWhat is the sequence of digits?\n\nThe sequence of digits is",
        "What is the sequence of digits?",
        "The sequence of digits is",
    ),
    "kv_retrieval": (
        {"input": '\nKey: "ab-1"\nThe value associated with the specified key is: ', "answer": ["cd-2"]},
        "Extract the value corresponding to the specified key in the JSON object below.\n\n",
        '\n\n\nKey: "ab-1"\nThe value associated with the specified key is: ',
        'Key: "ab-1"',
        "The value associated with the specified key is:",
    ),
    "longdialogue_qa_eng": (
        {"input": "", "answer": ["ACE", "SAM"]},
        'Below is a dialogue script where one random occurrence of a character name is replaced with "$$MASK$$", and '
        "you should try to guess who that character is.\n\n",
        "\n\nThe name that has been replaced with $$MASK$$ is likely",
        "Which character's name was replaced with $$MASK$$?",
        "The name that has been replaced with $$MASK$$ is likely",
    ),
    "longbook_qa_eng": (
        {"input": "Who {is} it?", "answer": ["A baker", "The baker of Ull"]},
        "Read the book and answer the question. Be very concise in your answer.\n\n",
        "\n\nQuestion: Who {is} it?\nAnswer:",
        "Question: Who {is} it?",
        "Answer:",
    ),
    "longbook_qa_chn": (
        {"input": "谁来了", "answer": ["老王"]},
        "阅读以下书籍然后回答问题。\n\n",
        "\n\n问题：谁来了\n答案：",  # noqa: RUF001
        "问题：谁来了",  # noqa: RUF001
        "答案：",  # noqa: RUF001
    ),
    "longbook_choice_eng": (
        {"input": "What did he do?", "answer": ["save"], "options": OPTIONS},
        "Read the book and answer the question.\n\n",
        f"\n\nQuestion: What did he do?\n{LISTED}\n\nThe letter of the correct answer is",
        f"Question: What did he do?\n{LISTED}",
        "The letter of the correct answer is",
    ),
    "longbook_sum_eng": (
        {"answer": ["He came, he saw."]},
        "Summarize the book below.\n\n",
        "\n\nSummary:",
        "Write the summary of the book above.",
        "Summary:",
    ),
    "code_run": (
        {"input": "What does func_12(-3) return? Not func_1(2).", "answer": [-4]},
        "There is a function called func_12 in the following Python code.\n\n",
        "\n\nPlease compute the exact value of func_12(-3). The value of func_12(-3) is",
        "Please compute the exact value of func_12(-3).",
        "The value of func_12(-3) is",
    ),
    "code_debug": (
        {"input": "", "answer": ["send_all", "C"], "options": OPTIONS},
        "Following is a Python code where exactly one of the functions/methods has a deliberate error that makes it "
        "crash.\n\n",
        f"\n\nOptions:\n{LISTED}\n\nThe correct option is:",
        f"Options:\n{LISTED}",
        "The correct option is:",
    ),
    "math_find": (
        {"input": "Give one number. The second largest number of the list is: ", "answer": [94]},
        "What is the second largest number in the following list?\n\n",
        "\n\nGive one number. The second largest number of the list is: ",
        "Give one number.",
        "The second largest number of the list is:",
    ),
    "math_calc": (
        {"answer": [[5, 8, 1]]},
        CALC_LEAD,
        "\nValues:",
        "What are the intermediate values of the last expression? Give them as in the examples.",
        "Values:",
    ),
}
ANSWERS = {
    "longdialogue_qa_eng": ("ACE", "SAM"),
    "longbook_qa_eng": ("A baker", "The baker of Ull"),
    "longbook_choice_eng": ("save", "B"),
    "code_run": ("-4",),
    "code_debug": ("send_all", "C"),
    "math_find": ("94",),
    "math_calc": ("5", "8", "1"),
}


def row(task: str, number: int = 0, **values: Any) -> dict[str, Any]:
    return {"id": number, "context": f"Context {{number}} {number}.", **CASES[task][0], **values}


def write_rows(folder: Path, task: str, *rows: dict[str, Any]) -> Path:
    file = folder / f"{task}.jsonl"
    file.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows), encoding="utf-8")
    return file


def samples_of(folder: Path, task: str, *, template: bool = False, **values: Any) -> list[Sample]:
    tokenizer = byte_tokenizer() if template else byte_tokenizer(template=None)
    config = InfiniteBenchConfig(tasks=task, data_dir=str(folder), **values)
    return list(config.samples(tokenizer, len(tokenizer), seed=0))


def texts(sample: Sample) -> tuple[str, str]:
    tokenizer = byte_tokenizer()
    return tokenizer.decode(sample.document_ids[0]), tokenizer.decode(sample.query_ids[0])


def test_every_task_has_a_case() -> None:
    assert tuple(CASES) == TASKS == InfiniteBenchConfig().tasks


@pytest.mark.parametrize("task", TASKS)
def test_a_model_without_a_template_gets_the_benchmarks_text(tmp_path: Path, task: str) -> None:
    write_rows(tmp_path, task, row(task, 5))
    (sample,) = samples_of(tmp_path, task)
    _, lead, tail, _, _ = CASES[task]
    assert texts(sample) == (f"<s>{lead}Context {{number}} 5.", tail)
    assert sample.query_position == 1
    assert sample.max_new_tokens == ANSWER_TOKENS[task]
    assert sample.answers == ANSWERS.get(task, tuple(CASES[task][0]["answer"]))
    assert sample.labels == {"task": task, "truncated": False}
    assert sample.notes == {"row_id": 5, "whole_document_tokens": sample.document_ids.shape[1]}
    assert sample.generate == {}


@pytest.mark.parametrize("task", TASKS)
def test_a_chat_gets_turns_and_its_answer_begun(tmp_path: Path, task: str) -> None:
    write_rows(tmp_path, task, row(task, 5))
    (sample,) = samples_of(tmp_path, task, template=True)
    _, lead, _, question, cue = CASES[task]
    document, query = texts(sample)
    assert document == f"<s><|user|>{lead}Context {{number}} 5.</s>"
    assert query == f"<|user|>{question}</s><|assistant|>{cue}"
    assert sample.query_position == 2


def test_budgets_are_the_benchmarks() -> None:
    assert ANSWER_TOKENS == {
        "passkey": 6,
        "number_string": 12,
        "kv_retrieval": 50,
        "longdialogue_qa_eng": 40,
        "longbook_qa_eng": 40,
        "longbook_qa_chn": 40,
        "longbook_choice_eng": 40,
        "longbook_sum_eng": 1200,
        "code_run": 5,
        "code_debug": 5,
        "math_find": 3,
        "math_calc": 30000,
    }


def test_questions_that_are_all_cue(tmp_path: Path) -> None:
    write_rows(tmp_path, "math_find", row("math_find", input="The median number of the list is: "))
    assert texts(samples_of(tmp_path, "math_find", template=True)[0])[1] == (
        "<|user|>What is the median number in the list above?</s><|assistant|>The median number of the list is:"
    )
    write_rows(tmp_path, "kv_retrieval", row("kv_retrieval", input="What is under ab-1?"))
    query = texts(samples_of(tmp_path, "kv_retrieval", template=True)[0])[1]
    assert query == "<|user|>What is under ab-1?</s><|assistant|>"


def test_the_first_rows_in_the_order_of_the_file(tmp_path: Path) -> None:
    file = write_rows(tmp_path, "passkey", *(row("passkey", number) for number in (7, 3, 5)))
    write_rows(tmp_path, "code_run", row("code_run", 1))
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n\r\n", 1))
    config = InfiniteBenchConfig(tasks=["code_run", "passkey"], num_samples=2, data_dir=str(tmp_path))
    found = list(config.samples(byte_tokenizer(), 256, seed=3))
    assert [(one.labels["task"], one.notes["row_id"]) for one in found] == [
        ("code_run", 1),
        ("passkey", 7),
        ("passkey", 3),
    ]
    # Rows after those asked for are not read.
    file.write_bytes(file.read_bytes() + b"no row")
    assert len(samples_of(tmp_path, "passkey", num_samples=3)) == 3


@pytest.mark.parametrize("template", [False, True])
@pytest.mark.parametrize("max_tokens", [1000, 1001])
def test_a_long_document_loses_the_middle_of_the_prompt(tmp_path: Path, template: bool, max_tokens: int) -> None:
    context = "".join(f"<{number:05d}>" for number in range(300))
    write_rows(tmp_path, "passkey", row("passkey", context=context), row("passkey", 1))
    (whole, _), (cut, short) = (
        samples_of(tmp_path, "passkey", template=template, max_tokens=limit) for limit in (None, max_tokens)
    )
    assert (whole.labels["truncated"], cut.labels["truncated"], short.labels["truncated"]) == (False, True, False)
    ids, kept = whole.document_ids[0].tolist(), cut.document_ids[0].tolist()
    num_query = whole.query_ids.shape[1]
    half = (max_tokens - 6) // 2
    prompt = ids + whole.query_ids[0].tolist()
    assert kept + cut.query_ids[0].tolist() == prompt[:half] + prompt[-half:]
    assert len(kept) + num_query + 6 in (max_tokens - 1, max_tokens)
    assert cut.query_position == whole.query_position
    assert cut.notes == {"row_id": 0, "whole_document_tokens": len(ids)}


def test_what_just_fits_is_not_cut(tmp_path: Path) -> None:
    write_rows(tmp_path, "passkey", row("passkey"))
    (sample,) = samples_of(tmp_path, "passkey")
    total = sample.document_ids.shape[1] + sample.query_ids.shape[1] + 6
    for limit, truncated in ((total, False), (total - 1, True)):
        assert samples_of(tmp_path, "passkey", max_tokens=limit)[0].labels["truncated"] is truncated


def test_max_tokens_comes_from_the_model_unless_given() -> None:
    assert InfiniteBenchConfig().fitted(4096).max_tokens == 4096
    assert InfiniteBenchConfig(max_tokens=100).fitted(4096).max_tokens == 100
    assert InfiniteBenchConfig().fitted(None).max_tokens is None


def test_no_room_for_a_document(tmp_path: Path) -> None:
    write_rows(tmp_path, "math_calc", row("math_calc", context="1 + 2"))
    with pytest.raises(ValueError, match=r"task\.max_tokens=4096 leaves too little .* math_calc.* 30000") as raised:
        samples_of(tmp_path, "math_calc", max_tokens=4096)
    assert "task.max_new_tokens" in str(raised.value) and "task.tasks" in str(raised.value)
    assert samples_of(tmp_path, "math_calc", max_tokens=4096, max_new_tokens=100)[0].max_new_tokens == 100


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"tasks": "paskey"}, ("task.tasks='paskey'", "Did you mean 'passkey'?")),
        ({"tasks": []}, ("task.tasks=[]", "at least one")),
        ({"tasks": ["passkey", "passkey"]}, ("task.tasks", "twice")),
        ({"num_samples": 0}, ("task.num_samples=0",)),
        ({"max_tokens": 0}, ("task.max_tokens=0",)),
        ({"max_new_tokens": 1.5}, ("task.max_new_tokens=1.5",)),
        ({"data_dir": 5}, ("task.data_dir=5",)),
        ({"length": 5}, ("task key='length'",)),
    ],
)
def test_bad_values_are_named(values: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as raised:
        build_task_config({"name": "infinitebench", **values})
    for part in parts:
        assert part in str(raised.value)


def test_missing_files_are_named(tmp_path: Path) -> None:
    write_rows(tmp_path, "passkey", row("passkey"))
    tasks = ["passkey", "math_find"]
    InfiniteBenchConfig(tasks="passkey", data_dir=str(tmp_path)).check_sources()
    with pytest.raises(ValueError, match=r"task\.data_dir is missing: passkey .* passkey\.jsonl"):
        InfiniteBenchConfig(tasks=tasks).check_sources()
    with pytest.raises(ValueError, match="there is no folder"):
        InfiniteBenchConfig(tasks=tasks, data_dir=str(tmp_path / "none")).check_sources()
    with pytest.raises(ValueError, match=r"math_find needs .*, which does not exist") as raised:
        InfiniteBenchConfig(tasks=tasks, data_dir=str(tmp_path)).check_sources()
    assert str(tmp_path / "math_find.jsonl") in str(raised.value)


def test_without_a_tokenizer() -> None:
    with pytest.raises(ValueError, match="needs a tokenizer"):
        next(InfiniteBenchConfig(tasks="passkey").samples(None, 100, seed=0))


def test_missing_rouge_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for task in ("longbook_sum_eng", "passkey"):
        write_rows(tmp_path, task, row(task))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    InfiniteBenchConfig(tasks="passkey", data_dir=str(tmp_path)).check_sources()
    with pytest.raises(RuntimeError, match=r"rouge_score.*pip install -e '\.\[eval\]'"):
        InfiniteBenchConfig(tasks="longbook_sum_eng", data_dir=str(tmp_path)).check_sources()


@pytest.mark.parametrize(
    ("task", "bad", "part"),
    [
        ("passkey", "{'id': 1}", "not JSON"),
        ("passkey", "[1, 2]", "not an object"),
        ("passkey", "\udcff", "not UTF-8"),
        ("passkey", {"id": None}, "id=null"),
        ("passkey", {"id": True}, "id=true"),
        ("passkey", {"context": " "}, 'context=" "'),
        ("passkey", {"context": ["a"]}, 'context=["a"]'),
        ("passkey", {"input": ""}, 'input=""'),
        ("passkey", {"answer": []}, "answer=[]"),
        ("passkey", {"answer": ["1", ""]}, 'answer=["1", ""]'),
        ("passkey", {"answer": [12]}, "answer=[12]"),
        ("code_run", {"input": "What is f(3)?"}, "a call such as func_12(3)"),
        ("code_run", {"answer": ["4"]}, 'answer=["4"] must be a list of integers'),
        ("code_run", {"answer": [4, 5]}, "must be one number"),
        ("code_run", {"answer": [True]}, "answer=[true]"),
        ("math_find", {"input": "Which one?"}, "which number is wanted"),
        ("math_find", {"answer": None}, "answer=null must be a list of numbers"),
        ("math_calc", {"answer": [[]]}, "answer=[[]]"),
        ("math_calc", {"answer": [1, 2.5]}, "must be a list of integers"),
        ("code_debug", {"options": OPTIONS[:3]}, "must be a list of 4 texts"),
        ("code_debug", {"options": None}, "options=null"),
        ("code_debug", {"answer": ["open"]}, 'answer=["open"] must be one of the options'),
        ("longbook_choice_eng", {"answer": ["save", "E"]}, "an option and its letter"),
    ],
)
def test_bad_rows_are_named_by_their_line(tmp_path: Path, task: str, bad: Any, part: str) -> None:
    text = bad if isinstance(bad, str) else json.dumps(row(task, **bad))
    file = tmp_path / f"{task}.jsonl"
    file.write_bytes(f"{json.dumps(row(task))}\n\n{text}\n".encode(errors="surrogateescape"))
    assert len(samples_of(tmp_path, task, num_samples=1)) == 1
    with pytest.raises(ValueError) as raised:
        samples_of(tmp_path, task)
    assert f"{file}, line 3: " in str(raised.value) and part in str(raised.value)


def test_a_file_without_rows(tmp_path: Path) -> None:
    (tmp_path / "passkey.jsonl").write_text("\n \n")
    with pytest.raises(ValueError, match=r"passkey\.jsonl has no rows"):
        samples_of(tmp_path, "passkey")


def test_long_values_are_shortened_in_messages(tmp_path: Path) -> None:
    write_rows(tmp_path, "passkey", row("passkey", context=["a" * 100_000]))
    with pytest.raises(ValueError) as raised:
        samples_of(tmp_path, "passkey")
    assert len(str(raised.value)) < 500


def test_an_answer_may_be_given_bare(tmp_path: Path) -> None:
    for task, answer, expected in (("passkey", "71", ("71",)), ("code_debug", "load", ("load", "A"))):
        write_rows(tmp_path, task, row(task, answer=answer))
        assert samples_of(tmp_path, task)[0].answers == expected
    write_rows(tmp_path, "math_calc", row("math_calc", answer=[3, -1]))
    assert samples_of(tmp_path, "math_calc")[0].answers == ("3", "-1")


CHOICE = ("save", "B")
BUG = ("send_all", "C")


@pytest.mark.parametrize(
    ("task", "answers", "prediction", "expected"),
    [
        ("passkey", ("71432",), " 71432. Remember", 1),
        ("passkey", ("71432",), "The key: 71432", 1),
        ("passkey", ("71432",), "12 71432", 0),
        ("passkey", ("71432",), "714321", 0),
        ("passkey", ("71432",), "", 0),
        ("number_string", ("0077",), "0077.", 1),
        ("number_string", ("0077",), "77", 0),
        ("kv_retrieval", ("ab-12",), '{"key": "ab-12"}', 1),
        ("kv_retrieval", ("ab-12",), "ab-123", 0),
        ("kv_retrieval", ("ab-12",), "", 0),
        ("longdialogue_qa_eng", ("ACE", "SAM"), "Ace.", 1),
        ("longdialogue_qa_eng", ("ACE", "SAM"), "It is ace, I think", 1),
        ("longdialogue_qa_eng", ("ACE", "SAM"), "SAM", 0),
        ("longdialogue_qa_eng", ("ACE",), "Aces", 0),
        ("longbook_qa_eng", ("the baker of Ull",), "A Baker, of ULL!", 1),
        ("longbook_qa_eng", ("a miller", "the baker of Ull"), "the baker", 0.5),
        ("longbook_qa_eng", ("baker",), "baker baker", 2 / 3),
        ("longbook_qa_eng", ("baker",), "", 0),
        ("longbook_qa_eng", ("the",), "the", 0),
        ("longbook_qa_chn", ("老王。",), "“老 王”", 1),
        ("longbook_qa_chn", ("小李", "老王"), "王", 2 / 3),
        ("longbook_qa_chn", ("A王",), "a王", 1),
        ("longbook_qa_chn", ("老王",), "。", 0),
        ("longbook_choice_eng", CHOICE, " B", 1),
        ("longbook_choice_eng", CHOICE, "B. save", 1),
        ("longbook_choice_eng", CHOICE, "A", 0),
        ("longbook_choice_eng", CHOICE, "C, not B", 0),
        ("longbook_choice_eng", CHOICE, "save", 1),
        ("longbook_choice_eng", CHOICE, "the answer is: B", 1),
        ("longbook_choice_eng", CHOICE, "the answer is save", 1),
        ("longbook_choice_eng", CHOICE, "the answer is: C or B", 0),
        ("longbook_choice_eng", CHOICE, "the answer is:", 0),
        ("longbook_choice_eng", CHOICE, "It is (so) B. Or C.", 1),
        ("longbook_choice_eng", CHOICE, "It is D or B", 0),
        ("longbook_choice_eng", CHOICE, "nothing", 0),
        ("longbook_choice_eng", CHOICE, "", 0),
        ("code_run", ("-4",), " -4.", 1),
        ("code_run", ("-4",), "4", 0),
        ("code_run", ("4",), "func_1(2) = 4", 1),
        ("code_run", ("4",), "4 is the value", 0),
        ("code_run", ("4",), "", 0),
        ("code_debug", BUG, " C. send_all", 1),
        ("code_debug", BUG, "C: it is", 1),
        ("code_debug", BUG, "C", 1),
        ("code_debug", BUG, "A. load", 0),
        ("code_debug", BUG, "C is it", 0),
        ("code_debug", BUG, "The answer is: **C**", 1),
        ("code_debug", BUG, "The answer is: C", 1),
        ("code_debug", BUG, "The error is: send_all", 1),
        ("code_debug", BUG, "answer: D", 0),
        ("code_debug", BUG, "The answer is:", 0),
        ("code_debug", BUG, "", 0),
        ("math_find", ("94",), " 94, 95", 1),
        ("math_find", ("94",), "94.5", 0),
        ("math_find", ("94",), "94.0", 1),
        ("math_find", ("2.5",), "It is 2.50", 1),
        ("math_find", ("94",), "none", 0),
        ("math_calc", ("5", "8", "1", "7"), "[5, 8, 1, 7]", 1),
        ("math_calc", ("5", "8", "1", "7"), "[5, 8, 2, 7]", 0.5),
        ("math_calc", ("5", "8", "1", "7"), "5 8 1", 0.75),
        ("math_calc", ("5", "8"), "[5, 8, 9]", 1),
        ("math_calc", ("5", "8"), "8", 0),
        ("math_calc", ("5", "-8"), "5, -8", 0.5),
        ("math_calc", ("5", "8"), "", 0),
    ],
)
def test_scores(task: str, answers: tuple[str, ...], prediction: str, expected: float) -> None:
    assert score(task, answers, prediction) == pytest.approx(expected)


@needs_rouge
def test_summaries_are_compared_line_by_line() -> None:
    right = "The cat sat.\nThe dog ran."
    assert score("longbook_sum_eng", (right,), right) == 1
    assert score("longbook_sum_eng", (right,), "The dog ran.\nThe cat sat.") == 1  # the order of lines does not matter
    assert score("longbook_sum_eng", (right,), "The cat sat.") == pytest.approx(2 * 1 * 0.5 / 1.5)
    assert score("longbook_sum_eng", ("Nothing here", right), right) == 1
    assert score("longbook_sum_eng", (right,), "") == 0
    assert score("longbook_sum_eng", ("running",), "runs") == 0  # words are not stemmed


def test_the_config_scores_by_the_samples_task(tmp_path: Path) -> None:
    write_rows(tmp_path, "longbook_choice_eng", row("longbook_choice_eng"))
    (sample,) = samples_of(tmp_path, "longbook_choice_eng")
    config = InfiniteBenchConfig()
    assert (config.score(sample, "B"), config.score(sample, "D")) == (1, 0)
