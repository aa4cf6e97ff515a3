"""Tasks of lm-evaluation-harness: any that asks for generated text or for the likelihood of choices.

`split` cuts a rendered prompt into document and query, `prompts` turns the harness's instances into requests, `model`
answers them with an engine, `load` finds tasks and their data, `documents` has the harness build and score them, and
`config` holds the settings. Only `config` and `split` work without the harness.
"""

from __future__ import annotations

from apb_ds.tasks.lm_eval.config import LmEvalConfig

__all__ = ["LmEvalConfig"]
