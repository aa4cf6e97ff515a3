"""RULER (arXiv 2404.06654): its 13 tasks as lm-evaluation-harness makes and scores them.

`harness` loads the harness's code, `generate` has it make samples, `sources` reads the files that some tasks need,
`cache` keeps what was made, `prompts` cuts a prompt into document and query, and `config` holds the settings.
"""

from __future__ import annotations

from apb_ds.tasks.ruler.config import RulerConfig

__all__ = ["RulerConfig"]
