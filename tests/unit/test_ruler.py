"""RULER: prompts and scores are the harness's, limited in number, cached and made without a network."""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from apb_ds.tasks import RulerConfig, Sample, build_task_config
from apb_ds.tasks.ruler import generate as generation
from apb_ds.tasks.ruler import harness
from apb_ds.tasks.ruler.names import ESSAY_TASKS, QUESTION_FILES, SYNTHETIC_TASKS, TASKS
from apb_ds.tasks.ruler.prompts import split_text
from apb_ds.tasks.template import with_template
from tests.unit.smollm2 import smollm2_directory, smollm2_tokenizer

ROOT = Path(__file__).resolve().parents[2]
LENGTH = 1024
ESSAY_LENGTH = 1536  # the harness adds essays 500 words at a time
NUM_SAMPLES = 2
needs_harness = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("lm_eval", "wonderwords", "nltk", "scipy")),
    reason="missing: lm_eval, wonderwords, nltk and scipy (pip install -e '.[eval]')",
)


@pytest.fixture(scope="module")
def chat_tokenizer() -> Any:
    return smollm2_tokenizer()


@pytest.fixture(scope="module")
def base_tokenizer(chat_tokenizer: Any) -> Any:
    tokenizer = copy.deepcopy(chat_tokenizer)
    tokenizer.chat_template = None
    return tokenizer


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Essays and questions, shorter than the published ones but in the same format."""
    folder = tmp_path_factory.mktemp("data")
    for number in range(2):
        grains = ("rye", "oats", "wheat", "barley")
        sentences = [f"In the year of the {grain} the miller sold his {grain} to the town." for grain in grains * 60]
        (folder / f"essay{number}.txt").write_text("\n".join(sentences))
    paragraphs = [
        {
            "context": f"The river Osk number {number} is {number + 10} miles long and runs past the town of Ull.",
            "qas": [
                {
                    "question": f"How long is river {number}?",
                    "is_impossible": False,
                    "answers": [{"text": f"{number + 10} miles"}, {"text": f"{number + 10}"}],
                }
            ],
        }
        for number in range(40)
    ]
    (folder / QUESTION_FILES["ruler_qa_squad"]).write_text(json.dumps({"data": [{"paragraphs": paragraphs}]}))
    hops = [
        {
            "question": f"Who wrote book {number}?",
            "answer": f"Writer {number}",
            "context": [[f"Book {number}", [f"Writer {number} wrote it.", " It sold well."]]],
        }
        for number in range(40)
    ]
    (folder / QUESTION_FILES["ruler_qa_hotpot"]).write_text(json.dumps(hops))
    return str(folder)


@pytest.fixture
def empty_cache(tmp_path: Path, chat_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("APB_DS_CACHE", str(tmp_path))
    return tmp_path


def config_of(task: str, data_dir: str | None = None, **values: Any) -> RulerConfig:
    length = ESSAY_LENGTH if task in ESSAY_TASKS else LENGTH
    return RulerConfig(**{"tasks": task, "length": length, "num_samples": NUM_SAMPLES, "data_dir": data_dir, **values})


def texts(samples: list[Sample]) -> list[tuple[Any, ...]]:
    return [(sample.document_ids.tolist(), sample.query_ids.tolist(), sample.answers) for sample in samples]


def made_files(cache: Path) -> list[dict[str, Any]]:
    return [json.loads(file.read_text().partition("\n")[2]) for file in sorted((cache / "ruler").glob("*.json"))]


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"tasks": "niah_singel_1"}, ("task.tasks='niah_singel_1'", "Did you mean 'niah_single_1'?")),
        ({"tasks": ["ruler_vt", "ruler_cw"]}, ("task.tasks='ruler_cw'", "Did you mean 'ruler_cwe'?")),
        ({"tasks": []}, ("task.tasks=[]", "at least one")),
        ({"tasks": ["ruler_vt", "ruler_vt"]}, ("task.tasks", "twice")),
        ({"length": 255}, ("task.length=255", "at least 256")),
        ({"length": [4096, "8K"]}, ("task.length='8K'",)),
        ({"num_samples": 0}, ("task.num_samples=0",)),
        ({"max_new_tokens": 0}, ("task.max_new_tokens=0",)),
        ({"max_new_tokens": 512, "length": [512, 1024]}, ("task.max_new_tokens=512", "task.length=512")),
        ({"data_dir": 5}, ("task.data_dir=5",)),
        ({"sample": 5}, ("task key='sample'",)),
    ],
)
def test_bad_values_are_named(values: dict[str, Any], parts: tuple[str, ...]) -> None:
    with pytest.raises(ValueError) as raised:
        build_task_config({"name": "ruler", **values})
    for part in parts:
        assert part in str(raised.value)


def test_one_or_a_list() -> None:
    config = RulerConfig(tasks=["ruler_vt", "ruler_cwe"], length=512)
    assert (config.tasks, config.length) == (("ruler_vt", "ruler_cwe"), (512,))
    assert RulerConfig().tasks == SYNTHETIC_TASKS


@pytest.mark.parametrize(
    ("task", "file"),
    [(task, "*.txt") for task in ESSAY_TASKS] + list(QUESTION_FILES.items()),
)
def test_missing_file_is_named(tmp_path: Path, task: str, file: str) -> None:
    with pytest.raises(ValueError, match=r"task.data_dir is missing: " + task) as raised:
        config_of(task).check_sources()
    assert file in str(raised.value)
    with pytest.raises(ValueError, match="there is no folder") as raised:
        config_of(task, str(tmp_path / "none")).check_sources()
    with pytest.raises(ValueError, match="which does not exist") as raised:
        config_of(task, str(tmp_path)).check_sources()
    assert str(tmp_path / file) in str(raised.value)
    assert task in str(raised.value)


@pytest.mark.parametrize("package", ["lm_eval", "wonderwords", "nltk", "scipy"])
def test_missing_harness_names_the_extra(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else find("json"))
    with pytest.raises(RuntimeError, match=rf"the package {package} is missing.*pip install -e '\.\[eval\]'"):
        RulerConfig().check_sources()


def test_needs_a_tokenizer() -> None:
    with pytest.raises(ValueError, match=r"task=ruler needs a tokenizer.*model\.tokenizer"):
        next(RulerConfig().samples(None, 100, 0))


@needs_harness
def test_names_are_the_harness_own() -> None:
    from lm_eval.tasks._yaml_loader import load_yaml

    (folder,) = importlib.import_module(harness.RULER).__path__
    assert sorted(load_yaml(Path(folder) / "ruler.yaml")["task"]) == sorted(TASKS)


@needs_harness
@pytest.mark.parametrize("task", TASKS)
def test_no_more_is_made_than_asked_for(
    task: str, chat_tokenizer: Any, data_dir: str, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = harness.load_module(harness.read_task(task).module)
    name = generation.GENERATORS[module.__name__.rpartition(".")[2]]
    generator, made = getattr(module, name), []

    def counting(*args: Any, **kwargs: Any) -> list[dict[str, Any]]:
        rows = generator(*args, **kwargs)
        made.append(len(rows))
        return rows

    monkeypatch.setattr(module, name, counting)
    samples = list(config_of(task, data_dir).samples(chat_tokenizer, 100, 0))
    assert len(samples) == NUM_SAMPLES
    # Variable tracking first makes the example that precedes its prompts.
    assert made == ([1, NUM_SAMPLES] if task == "ruler_vt" else [NUM_SAMPLES])
    assert getattr(module, name) is counting


@needs_harness
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("chat", [True, False])
def test_prompts_are_the_harness_own(
    task: str, chat: bool, chat_tokenizer: Any, base_tokenizer: Any, data_dir: str, empty_cache: Path
) -> None:
    tokenizer = chat_tokenizer if chat else base_tokenizer
    samples = list(config_of(task, data_dir).samples(tokenizer, 100, 0))
    (content,) = made_files(empty_cache)
    assert len(samples) == len(content["samples"]) == NUM_SAMPLES
    for sample, made in zip(samples, content["samples"], strict=True):
        document, query = split_text(task, made["input"])
        assert document + query == made["input"]
        assert query.startswith(("What ", "Question: ", "Answer the question based on the given documents."))
        document_text = tokenizer.decode(sample.document_ids[0])
        query_text = tokenizer.decode(sample.query_ids[0])
        if chat:
            assert document in document_text
            assert f"user\n{query}<|im_end|>" in query_text
            assert query_text.endswith(f"assistant\n{made['gen_prefix']}")
        else:
            delimiter = "\n\n" if task == "ruler_cwe" else " "
            whole = tokenizer.bos_token + made["input"] + delimiter + made["gen_prefix"]
            assert document_text + query_text == whole
        assert sample.answers == tuple(made["outputs"])
        assert sample.ground_truth == ", ".join(made["outputs"])
        if task not in QUESTION_FILES:
            assert all(answer in document for answer in sample.answers)
            assert any(answer not in query for answer in sample.answers)


@needs_harness
@pytest.mark.parametrize(
    ("task", "budget"),
    [
        *((task, 128) for task in TASKS if task.startswith("niah")),
        *(("ruler_vt", 30), ("ruler_cwe", 120), ("ruler_fwe", 50), ("ruler_qa_squad", 32), ("ruler_qa_hotpot", 32)),
    ],
)
def test_prompt_and_answer_fit(
    task: str, budget: int, chat_tokenizer: Any, base_tokenizer: Any, data_dir: str, empty_cache: Path
) -> None:
    for tokenizer, asked in ((chat_tokenizer, None), (base_tokenizer, 150)):
        config = config_of(task, data_dir, length=[1600, 2000], max_new_tokens=asked)
        samples = list(config.samples(tokenizer, 100, 0))
        assert [sample.labels["length"] for sample in samples] == [1600] * NUM_SAMPLES + [2000] * NUM_SAMPLES
        for sample in samples:
            num_tokens = sample.document_ids.shape[1] + sample.query_ids.shape[1]
            assert sample.max_new_tokens == (asked or budget)
            assert num_tokens + sample.max_new_tokens <= sample.labels["length"]
            assert sample.labels["task"] == task
            assert sample.labels.get("essays") == (data_dir if task in ESSAY_TASKS else None)


@needs_harness
@pytest.mark.parametrize(
    ("task", "length"), [("ruler_vt", 512), ("ruler_cwe", 256), ("niah_multikey_3", 256), ("niah_single_2", 512)]
)
def test_too_short_a_length_is_named(
    task: str, length: int, chat_tokenizer: Any, data_dir: str, empty_cache: Path
) -> None:
    with pytest.raises(ValueError, match=rf"task\.length={length} is too short for {task}.*raise task\.length"):
        list(config_of(task, data_dir, length=length).samples(chat_tokenizer, 100, 0))


@needs_harness
def test_made_once(chat_tokenizer: Any, empty_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of("ruler_fwe")
    first = texts(list(config.samples(chat_tokenizer, 100, 0)))
    assert texts(list(config.samples(chat_tokenizer, 100, 1))) != first
    assert len(made_files(empty_cache)) == 2

    def refuse(**_: Any) -> None:
        raise AssertionError("the generator was called")

    monkeypatch.setattr(harness.load_module("fwe_utils"), "fwe_download", refuse)
    assert texts(list(config.samples(chat_tokenizer, 100, 0))) == first
    with pytest.raises(AssertionError, match="the generator was called"):
        list(config.samples(chat_tokenizer, 100, 2))


@needs_harness
def test_a_system_prompt_takes_room(chat_tokenizer: Any, empty_cache: Path) -> None:
    """Prompts that were made without one, and are kept, would be too long."""
    config = config_of("ruler_fwe")
    list(config.samples(chat_tokenizer, 100, 0))
    with_system = with_template(chat_tokenizer, "Answer in as few words as you can, and do not explain." * 4, None)
    (*samples,) = config.samples(with_system, 100, 0)
    assert len(made_files(empty_cache)) == 2
    assert all(sample.num_positions <= config.lengths[0] for sample in samples)


@needs_harness
def test_a_damaged_file_is_made_again(chat_tokenizer: Any, empty_cache: Path) -> None:
    config = config_of("ruler_fwe")
    first = texts(list(config.samples(chat_tokenizer, 100, 0)))
    (file,) = (empty_cache / "ruler").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:100])
    assert texts(list(config.samples(chat_tokenizer, 100, 0))) == first
    assert file.read_bytes() == whole
    assert list((empty_cache / "ruler").iterdir()) == [file]


@needs_harness
def test_works_without_a_cache(
    chat_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("APB_DS_CACHE", str(tmp_path / "file"))
    assert len(list(config_of("ruler_fwe").samples(chat_tokenizer, 100, 0))) == NUM_SAMPLES
    assert "APB_DS_CACHE" in caplog.text


@needs_harness
@pytest.mark.parametrize(
    ("task", "word", "other"), [("niah_single_2", "miller", "baker"), ("ruler_qa_squad", "Ull", "Ulm")]
)
def test_other_files_make_other_samples(
    task: str, word: str, other: str, chat_tokenizer: Any, data_dir: str, empty_cache: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "changed"
    folder.mkdir()
    for file in Path(data_dir).iterdir():
        (folder / file.name).write_text(file.read_text().replace(word, other))
    for source, there, gone in ((data_dir, word, other), (str(folder), other, word)):
        for sample in config_of(task, source).samples(chat_tokenizer, 100, 0):
            document = chat_tokenizer.decode(sample.document_ids[0])
            assert there in document
            assert gone not in document


@needs_harness
def test_questions_that_do_not_fit_are_left_out(
    chat_tokenizer: Any, data_dir: str, empty_cache: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    name = QUESTION_FILES["ruler_qa_hotpot"]
    content = json.loads((Path(data_dir) / name).read_text())
    content[0]["context"] = [["Long", ["It went on and on. "] * 1000]]
    (tmp_path / name).write_text(json.dumps(content))
    (sample,) = config_of("ruler_qa_hotpot", str(tmp_path)).samples(chat_tokenizer, 100, 0)
    assert sample.answers == ("Writer 1",)
    assert "ruler_qa_hotpot: only 1 of 2 samples fit into task.length=1024" in caplog.text


@needs_harness
def test_random_numbers_of_the_process_are_untouched(chat_tokenizer: Any, empty_cache: Path) -> None:
    random.seed(1)
    np.random.seed(1)
    expected = random.Random(1).random(), np.random.RandomState(1).random_sample()
    list(config_of("ruler_vt").samples(chat_tokenizer, 100, 0))
    assert (random.random(), np.random.random_sample()) == expected


SCRIPT = """
import json, sys
attempts = []
def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "urllib.Request"):
        attempts.append(event)
        raise OSError("no network")
sys.addaudithook(watch)
from transformers import AutoTokenizer
from apb_ds.tasks import RulerConfig
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
config = RulerConfig(tasks=json.loads(sys.argv[2]), length=1536, num_samples=2, data_dir=sys.argv[3])
samples = [[s.document_ids.tolist(), s.query_ids.tolist(), list(s.answers)] for s in config.samples(tokenizer, 1, 3)]
print(json.dumps({"samples": samples, "attempts": attempts}))
"""


@needs_harness
def test_another_process_makes_the_same_offline(
    chat_tokenizer: Any, data_dir: str, empty_cache: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "HOME": str(tmp_path / "home"), "APB_DS_CACHE": str(tmp_path / "other")}
    environment.update(PYTHONHASHSEED="7", PYTHONPATH=str(ROOT))
    # In another order: a task's draws do not depend on the tasks before it.
    arguments = [str(smollm2_directory()), json.dumps(TASKS[::-1]), data_dir]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["attempts"] == []
    config = RulerConfig(tasks=TASKS, length=ESSAY_LENGTH, num_samples=NUM_SAMPLES, data_dir=data_dir)
    here = [[*one[:2], list(one[2])] for one in texts(list(config.samples(chat_tokenizer, 1, 3)))]
    assert sorted(result["samples"]) == sorted(here)
    assert len(here) == len(TASKS) * NUM_SAMPLES


@needs_harness
@pytest.mark.parametrize(
    ("task", "answers", "prediction", "expected"),
    [
        ("niah_single_1", ("123",), " 1234.", 1.0),
        ("niah_multivalue", ("1", "2", "3", "4"), "1 and 3", 0.5),
        ("ruler_vt", ("ABCDE", "FGHIJ"), "abcde\x00fghij", 1.0),
        ("ruler_cwe", ("one", "two"), "three", 0.0),
        ("ruler_qa_squad", ("ten miles", "ten"), "Ten kilometres", 0.5),
        ("ruler_qa_hotpot", ("yes",), "Yes, it is", 1.0),
    ],
)
def test_scores_are_the_harness_own(task: str, answers: tuple[str, ...], prediction: str, expected: float) -> None:
    import torch

    ids = torch.zeros(1, 1, dtype=torch.int64)
    sample = Sample(ids, ids, 0, 1, ", ".join(answers), answers=answers, labels={"task": task, "length": 4096})
    common = harness.load_module("common_utils")
    process = common.process_results_part if task in QUESTION_FILES else common.process_results
    doc = {"max_length": 4096, "outputs": list(answers)}
    assert RulerConfig().score(sample, prediction) == process(doc, [prediction])["4096"] == expected


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        ("ruler_qa_squad", lambda text: text[:50], "is not JSON"),
        ("ruler_qa_squad", lambda text: "[1]", "differs from the original"),
        ("ruler_qa_hotpot", lambda text: '{"data": 1}', "differs from the original"),
        ("ruler_qa_hotpot", lambda text: json.dumps(json.loads(text)[:1]), "more than the 1 questions"),
        ("niah_single_2", lambda text: text[:500], "too few for task.length=1536"),
        ("niah_single_2", lambda text: " \n", "there are no words"),
    ],
)
@needs_harness
def test_unusable_files(
    task: str,
    change: Callable[[str], str],
    message: str,
    chat_tokenizer: Any,
    data_dir: str,
    empty_cache: Path,
    tmp_path: Path,
) -> None:
    name = QUESTION_FILES.get(task, "essay0.txt")
    (tmp_path / name).write_text(change((Path(data_dir) / name).read_text()))
    with pytest.raises(ValueError, match=message) as raised:
        list(config_of(task, str(tmp_path)).samples(chat_tokenizer, 100, 0))
    assert "task." in str(raised.value)
