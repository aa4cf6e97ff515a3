"""RULER's tasks by the harness's names, and the files that some of them need."""

from __future__ import annotations

# Tasks made only of words that the harness includes.
SYNTHETIC_TASKS = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "ruler_vt", "ruler_cwe", "ruler_fwe")
# Needles between the sentences of essays: *.txt files in `task.data_dir`.
ESSAY_TASKS = ("niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multivalue", "niah_multiquery")
# Questions about paragraphs: the original file, under the name its makers publish it by.
QUESTION_FILES = {"ruler_qa_squad": "dev-v2.0.json", "ruler_qa_hotpot": "hotpot_dev_distractor_v1.json"}
TASKS = (*SYNTHETIC_TASKS, *ESSAY_TASKS, *QUESTION_FILES)
