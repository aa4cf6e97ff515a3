"""InfiniteBench (arXiv 2402.13718): its 12 tasks, read from the benchmark's own files.

`names` lists the tasks and their answers' lengths, `rows` reads and checks the files, `prompts` makes a row's document
and query and cuts what is too long, `scoring` scores answers, and `config` holds the settings.
"""

from __future__ import annotations

from apb_ds.tasks.infinitebench.config import InfiniteBenchConfig

__all__ = ["InfiniteBenchConfig"]
