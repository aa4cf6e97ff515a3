"""task=lm_eval and HarnessModel on one and two ranks: the harness's scores, resumed jobs, failures."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import apb_ds
from tests.harness_tasks import DOCUMENTS, responses, task_manager, write_tasks
from tests.launch_in_process import Ended, run_infer
from tests.pool import Pools, RankError
from tests.tiny_checkpoint import TEMPLATE, byte_tokenizer, save_checkpoint

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("missing: lm_eval (pip install -e '.[eval]')", allow_module_level=True)

SIZES = pytest.mark.parametrize("world_size", [1, 2])
NAMES = ("lamp_text", "lamp_prefix", "lamp_choice")
HOSTS = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm_eval")
    save_checkpoint(folder / "model")
    write_tasks(folder / "tasks")
    refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    byte_tokenizer(template=refusal + TEMPLATE).save_pretrained(folder / "no_system")
    thinking = TEMPLATE.replace("'<|assistant|>' }}", "'<|assistant|>' + ('' if enable_thinking else 'Now: ') }}")
    byte_tokenizer(template=thinking).save_pretrained(folder / "thinking")
    return folder


def launch(pool: Pools, world_size: int, folder: Path, output: Path, *overrides: str, patches: Any = ()) -> list[Ended]:
    arguments = [
        "task=lm_eval",
        f"task.include_path={folder}/tasks",
        f"model.path={folder}/model",
        "model.device=cpu",
        f"method.hosts={HOSTS}",
        f"eval.output={output}",
        f"hydra.run.dir={output.parent}/run",
        *overrides,
    ]
    return pool(world_size).run(run_infer, arguments, "", patches, "eval", timeout=120)


def samples(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "samples.jsonl").read_text().splitlines()]


def evaluated(
    rank: int, world_size: int, folder: Path, names: tuple[str, ...], others: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Evaluate with the harness only; `others` are the tasks of the ranks after the first."""
    import lm_eval

    from apb_ds.parallel.groups import SequenceGroup

    group = SequenceGroup() if world_size == 1 else SequenceGroup.of(torch.distributed.group.WORLD)
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    engine = apb_ds.init_inference(model, apb_ds.APBConfig(hosts=HOSTS), group=group)
    lm = apb_ds.HarnessModel(engine, AutoTokenizer.from_pretrained(folder / "model"))
    results = lm_eval.simple_evaluate(
        model=lm,
        tasks=list(names if rank == 0 or not others else others),
        task_manager=task_manager(folder / "tasks"),
        apply_chat_template=True,
        bootstrap_iters=1000,
    )
    assert results is not None
    said = {name: responses(results, name) for name in results["samples"]}
    return {"results": results["results"], "responses": said}


@pytest.fixture(scope="module")
def by_harness(folder: Path) -> dict[str, Any]:
    return evaluated(0, 1, folder, NAMES)


@SIZES
def test_a_task_is_what_the_harness_makes_of_it(
    pool: Pools, folder: Path, tmp_path: Path, by_harness: dict[str, Any], world_size: int
) -> None:
    output = tmp_path / "out"
    ended = launch(
        pool,
        world_size,
        folder,
        output,
        f"task.tasks=[{','.join(NAMES)}]",
        patches=("text on the first rank only",),
    )
    assert [rank.code for rank in ended] == [0] * world_size, ended[0].stderr
    found = samples(output)
    assert [sample["id"] for sample in found] == [f"{name}/{number}" for name in NAMES for number in range(4)]
    for sample in found:
        name, number = sample["id"].split("/")
        said = by_harness["responses"][name][int(number)]
        if name == "lamp_choice":
            likelihoods = [one for one, _ in sample["answer"]]
            assert likelihoods == pytest.approx([choice[0][0] for choice in said], abs=1e-3)
            assert sample["reference"] == DOCUMENTS[int(number)]["label"]
        else:
            assert [[sample["answer"]]] == said
            assert sample["reference"] == "on the pier" and not sample["exact"]
        assert sample["score"] == next(iter(sample["metrics"].values()))
        assert sample["seconds"] >= sample["prefill_s"] > 0 and sample["document_tokens"] > sample["query_tokens"]
    summary = json.loads((output / "summary.json").read_text())
    assert [cell["labels"]["task"] for cell in summary["cells"]] == list(NAMES)
    for name in NAMES:
        ours, theirs = summary["harness"]["results"][name], by_harness["results"][name]
        assert {key: value for key, value in ours.items() if key != "alias"} == pytest.approx(
            {key: value for key, value in theirs.items() if key != "alias"}, nan_ok=True
        )
    assert "lamp_prefix" in ended[0].stdout and f"Results: {output}" in ended[0].stdout


def test_a_system_prompt_and_arguments_of_the_template(pool: Pools, folder: Path, tmp_path: Path) -> None:
    import lm_eval

    names, system, output = "lamp_text", "Answer in one word.", tmp_path / "out"
    given = (f"task.system={system}", "task.template={enable_thinking: true}", f"model.tokenizer={folder}/thinking")
    ended = launch(pool, 1, folder, output, f"task.tasks={names}", *given)
    assert ended[0].code == 0, ended[0].stderr
    tokenizer = AutoTokenizer.from_pretrained(folder / "thinking")
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    engine = apb_ds.init_inference(model, apb_ds.APBConfig(hosts=HOSTS))
    results = lm_eval.simple_evaluate(
        model=apb_ds.HarnessModel(engine, tokenizer, template={"enable_thinking": True}),
        tasks=[names],
        task_manager=task_manager(folder / "tasks"),
        system_instruction=system,
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    assert results is not None
    assert [[[sample["answer"]]] for sample in samples(output)] == responses(results, names)
    lm = apb_ds.HarnessModel(engine, tokenizer, template={"enable_thinking": True})
    chat = [{"role": "system", "content": system}, {"role": "user", "content": "A lamp.\n\nWhere?"}]
    request = lm.generation(lm.apply_chat_template(chat), {"until": []})
    before = tokenizer.decode(request.document_ids[0, : request.query_position])
    assert before == f"<s><|system|>{system}</s><|user|>"
    assert tokenizer.decode(request.query_ids[0]) == "Where?</s><|assistant|>"


def test_ranks_that_call_the_harness_in_the_same_way(pool: Pools, folder: Path, by_harness: dict[str, Any]) -> None:
    for rank in pool(2).run(evaluated, folder, NAMES, timeout=120):
        for name in NAMES[:2]:
            assert rank["responses"][name] == by_harness["responses"][name]
        for one, other in zip(rank["responses"]["lamp_choice"], by_harness["responses"]["lamp_choice"], strict=True):
            assert [choice[0][0] for choice in one] == pytest.approx([choice[0][0] for choice in other], abs=1e-3)


def test_ranks_with_different_prompts_are_refused(pool: Pools, folder: Path) -> None:
    with pytest.raises(RankError, match="the ranks have built different prompts") as raised:
        pool(2).run(evaluated, folder, ("lamp_text",), ("lamp_prefix",), timeout=120)
    assert str(raised.value).count("ValueError: the ranks have built different prompts") == 2


@SIZES
def test_a_stopped_job_is_resumed(pool: Pools, folder: Path, tmp_path: Path, world_size: int) -> None:
    output = tmp_path / "out"
    overrides = ("task.tasks=[lamp_text,lamp_prefix]", "task.num_samples=3", "task.max_new_tokens=3")
    overrides += ("task.apply_chat_template=false",)
    ended = launch(pool, world_size, folder, output, *overrides)
    assert ended[0].code == 0, ended[0].stderr
    whole = samples(output)
    assert len(whole) == 6 and all(sample["new_tokens"] == 3 for sample in whole)
    summary = json.loads((output / "summary.json").read_text())
    lines = (output / "samples.jsonl").read_text().splitlines(keepends=True)
    (output / "samples.jsonl").write_text("".join(lines[:4]))
    ended = launch(pool, world_size, folder, output, *overrides)
    assert ended[0].records[0]["metrics"]["resumed"] == 4
    again = samples(output)
    assert again[:4] == whole[:4] and [one["answer"] for one in again] == [one["answer"] for one in whole]
    assert json.loads((output / "summary.json").read_text())["harness"] == summary["harness"]
    refused = launch(pool, world_size, folder, output, *overrides, "task.split=line")
    assert refused[0].code == 2 and "task.split" in refused[0].stderr


@SIZES
def test_documents_that_are_answered_together(pool: Pools, folder: Path, tmp_path: Path, world_size: int) -> None:
    """Generated, sampled twice and chosen; the longest documents of each task do not fit; one by one it is the same."""
    names = ("lamp_text", "lamp_sampled", "lamp_choice")
    overrides = (f"task.tasks=[{','.join(names)}]", "+model.overrides.max_position_embeddings=300")
    found = {}
    for sequences in (1, 4):
        launch(pool, world_size, folder, tmp_path / f"{sequences}", *overrides, f"eval.sequences={sequences}")
        found[sequences] = samples(tmp_path / f"{sequences}")
        assert [one["id"] for one in found[sequences]] == [f"{name}/{number}" for name in names for number in range(4)]
    for one, other in zip(found[1], found[4], strict=True):
        if one["id"].startswith("lamp_choice") and "answer" in one:
            assert other["exact"] == one["exact"] and other["metrics"] == one["metrics"]
            for (ours, is_greedy), (theirs, was_greedy) in zip(other["answer"], one["answer"], strict=True):
                assert ours == pytest.approx(theirs, abs=1e-4) and is_greedy == was_greedy
            continue
        assert other.get("answer") == one.get("answer") and other.get("error") == one.get("error")
    assert ["error" in one for one in found[4]] == [False, False, False, True] * 3
    assert all(len(set(one["answer"])) == 2 for one in found[4][4:7]), "drawn twice"


def test_a_group(pool: Pools, folder: Path, tmp_path: Path) -> None:
    ended = launch(pool, 1, folder, tmp_path / "out", "task.tasks=lamps", "task.num_samples=1")
    assert ended[0].code == 0, ended[0].stderr
    assert [sample["id"] for sample in samples(tmp_path / "out")] == ["lamp_text/0", "lamp_prefix/0"]
    harness = json.loads((tmp_path / "out" / "summary.json").read_text())["harness"]
    assert harness["groups"]["lamps"]["sample_len"] == 2 and "exact_match,none" in harness["groups"]["lamps"]


@SIZES
def test_split_settings_reach_the_prompts(pool: Pools, folder: Path, tmp_path: Path, world_size: int) -> None:
    lengths = {}
    for name, setting in {"rule": "task.split=turn", "text": "task.query_start=harbour"}.items():
        ended = launch(pool, world_size, folder, tmp_path / name, "task.tasks=lamp_text", "task.num_samples=1", setting)
        assert ended[0].code == 0, ended[0].stderr
        lengths[name] = samples(tmp_path / name)[0]["query_tokens"]
    # A byte is a token, and </s><|assistant|> are two.
    assert lengths["text"] == len("harbour 0?") + 2
    document = DOCUMENTS[0]
    assert lengths["rule"] == len(f"{document['text']}\n\n{document['question']}") + 2


@SIZES
def test_failing_documents_are_counted(pool: Pools, folder: Path, tmp_path: Path, world_size: int) -> None:
    """One has no prompt; then the longest ones exceed the model's positions."""
    output = tmp_path / "empty"
    ended = launch(pool, world_size, folder, output, "task.tasks=lamp_empty", "task.apply_chat_template=false")
    assert [rank.code for rank in ended] == [2] * world_size and "1 of 4 samples failed" in ended[0].stderr
    assert ["error" in sample for sample in samples(output)] == [False, True, False, False]
    assert "the prompt is empty" in samples(output)[1]["error"]
    assert json.loads((output / "summary.json").read_text())["harness"]["results"]["lamp_empty"]["sample_len"] == 3

    limit = "+model.overrides.max_position_embeddings=250"
    ended = launch(pool, world_size, folder, tmp_path / "long", "task.tasks=[lamp_text,lamp_choice]", limit)
    found = samples(tmp_path / "long")
    failed = [sample["id"] for sample in found if "error" in sample]
    assert failed == ["lamp_text/2", "lamp_text/3", "lamp_choice/2", "lamp_choice/3"], [
        s["document_tokens"] for s in found
    ]
    assert "max_position_embeddings=250" in found[2]["error"] and "4 of 8 samples failed" in ended[0].stderr

    nothing = "+model.overrides.max_position_embeddings=50"
    launch(pool, world_size, folder, tmp_path / "all", "task.tasks=lamp_text", nothing)
    summary = json.loads((tmp_path / "all" / "summary.json").read_text())
    assert summary["all"]["failed"] == 4 and summary["harness"]["results"] == {}


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        ((), ("task.tasks is missing", "[gsm8k]")),
        (("task.tasks=[lamp_rolling]",), ("lamp_rolling", "loglikelihood_rolling", "task=fidelity")),
        (("task.tasks=[lamp_lost]",), ("lamp_lost", "cannot get the data", "nowhere.jsonl")),
        (("task.tasks=[lamp_txt]",), ("task.tasks='lamp_txt'", "Did you mean 'lamp_text'?")),
        (("task.tasks=[lamp_text]", "task.include_path=/nowhere/at/all"), ("task.include_path", "/nowhere/at/all")),
        (("task.tasks=[lamp_text]", "task.split=sentence"), ("task.split='sentence'", "paragraph, line, turn")),
        (("task.tasks=[lamp_text]", "task.num_samples=0"), ("task.num_samples=0", "at least 1")),
        (("task.tasks=[lamp_text,lamp_text]",), ("task.tasks", "none of them twice")),
        (("task.tasks=[lamp_text]", "task.template={style: 1}"), ("task.template.style", "no effect")),
        (
            ("task.tasks=[lamp_text]", "task.system=Be brief.", "model.tokenizer={folder}/no_system"),
            ("takes no system prompt", "task.system"),
        ),
    ],
)
def test_what_cannot_be_evaluated(
    pool: Pools, folder: Path, tmp_path: Path, overrides: tuple[str, ...], parts: tuple[str, ...]
) -> None:
    overrides = tuple(override.replace("{folder}", str(folder)) for override in overrides)
    ended = launch(pool, 2, folder, tmp_path / "out", *overrides)
    assert [rank.code for rank in ended] == [2, 2]
    for part in parts:
        assert part in ended[0].stderr, ended[0].stderr
    assert "Traceback" not in ended[0].stderr


def test_infer_refers_to_eval(pool: Pools, folder: Path, tmp_path: Path) -> None:
    arguments = [
        "task=lm_eval",
        "task.tasks=lamp_text",
        f"task.include_path={folder}/tasks",
        f"model.path={folder}/model",
    ]
    ended = pool(1).run(run_infer, [*arguments, "model.device=cpu", f"hydra.run.dir={tmp_path}"], timeout=60)
    assert ended[0].code == 2 and "launch/eval.py" in ended[0].stderr
