"""Slow imports, done once in the server that test processes fork from.

Finally hides everything from the garbage collector: a collection in a forked process would write to every object and
so copy the whole heap.
"""

from __future__ import annotations

import gc
import importlib

for _name in (
    "torch",
    "transformers",
    "deepspeed",
    "deepspeed.comm",
    "hydra",
    "transformers.models.llama.modeling_llama",
    "apb_ds.session",
    "apb_ds.engine.api",
):
    importlib.import_module(_name)

gc.collect()
gc.freeze()
