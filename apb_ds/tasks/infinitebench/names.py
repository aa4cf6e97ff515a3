"""InfiniteBench's tasks by the names of their files, and how many tokens their answers have at most."""

from __future__ import annotations

ANSWER_TOKENS = {
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
TASKS = tuple(ANSWER_TOKENS)
# Those with four options, of which one is right.
CHOICE_TASKS = ("longbook_choice_eng", "code_debug")
LETTERS = "ABCD"


def file_name(task: str) -> str:
    """Return what the benchmark calls the file of a task."""
    return f"{task}.jsonl"
