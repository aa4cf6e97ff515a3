"""Small tasks for lm-evaluation-harness with their documents, written into a folder: nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DOCUMENTS = [
    {
        "text": f"Harbour {number}. " + "The lamp is lit at dusk and put out at dawn. " * (3 + number),
        "question": f"Where is the lamp of harbour {number}?",
        "answer": "on the pier",
        "choices": ["on the pier", "at sea", "nowhere at all"],
        "label": number % 3,
    }
    for number in range(4)
]
EXACT_MATCH = "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]"
ACCURACY = (
    "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}, "
    "{metric: acc_mutual_info, aggregation: mean, higher_is_better: true}]"
)
GENERATION = "generation_kwargs: {until: ['#'], max_gen_toks: 6, do_sample: false}"
QUESTION = 'doc_to_text: "{{text}}\\n\\n{{question}}"'
TASKS: dict[str, tuple[str, ...]] = {
    "lamp_text": ("output_type: generate_until", QUESTION, 'doc_to_target: "{{answer}}"', GENERATION, EXACT_MATCH),
    "lamp_prefix": (
        "output_type: generate_until",
        QUESTION,
        'doc_to_target: "{{answer}}"',
        'gen_prefix: "It is"',
        'description: "Answer in a few words."',
        "num_fewshot: 1",
        GENERATION,
        EXACT_MATCH,
    ),
    "lamp_sampled": (
        "output_type: generate_until",
        QUESTION,
        'doc_to_target: "{{answer}}"',
        "generation_kwargs: {until: ['#'], max_gen_toks: 6, do_sample: true, temperature: 2.0}",
        "repeats: 2",
        EXACT_MATCH,
    ),
    "lamp_choice": (
        "output_type: multiple_choice",
        QUESTION,
        'doc_to_target: "{{label}}"',
        'doc_to_choice: "{{choices}}"',
        ACCURACY,
    ),
    "lamp_rolling": (
        "output_type: loglikelihood_rolling",
        'doc_to_text: ""',
        'doc_to_target: "{{text}}"',
        "metric_list: [{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]",
    ),
    "lamp_empty": (
        "output_type: generate_until",
        # The second document's prompt is empty.
        "doc_to_text: \"{{'' if question == 'Where is the lamp of harbour 1?' else question}}\"",
        'doc_to_target: "{{answer}}"',
        GENERATION,
        EXACT_MATCH,
    ),
    "lamp_lost": ("output_type: generate_until", QUESTION, 'doc_to_target: "x"', GENERATION, EXACT_MATCH),
}
GROUP = """group: lamps
task: [lamp_text, lamp_prefix]
aggregate_metric_list: [{metric: exact_match, weight_by_size: true}]
"""


def write_tasks(folder: Path, documents: list[dict[str, Any]] | None = None) -> Path:
    """Write the tasks, their data and a group of two of them; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents or DOCUMENTS))
    for name, lines in TASKS.items():
        source = data if name != "lamp_lost" else folder / "nowhere.jsonl"
        head = (
            f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {source}, train: {source}}}}}\n"
        )
        (folder / f"{name}.yaml").write_text(head + "test_split: test\nfewshot_split: train\n" + "\n".join(lines))
    (folder / "lamps.yaml").write_text(GROUP)
    return folder


def load_tasks(folder: Path, *names: str) -> list[Any]:
    """Return the harness's task objects, new each time, since an evaluation changes them."""
    return list(task_manager(folder).load(list(names))["tasks"].values())


def task_manager(folder: Path) -> Any:
    """Return an index of these tasks only; indexing the harness's own takes seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(folder), include_defaults=False)


def responses(results: dict[str, Any], task: str) -> list[Any]:
    """Return the model's answer to each document of an evaluation."""
    return [sample["resps"] for sample in sorted(results["samples"][task], key=lambda sample: sample["doc_id"])]
