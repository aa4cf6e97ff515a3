"""InfiniteBench's tasks, by the names of their files, and their answers' length in tokens at most."""

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
# Tasks with four options, one of which is right.
CHOICE_TASKS = ("longbook_choice_eng", "code_debug")
LETTERS = "ABCD"
