"""What the server of the forked processes has loaded: the modules whose import takes long.

The last thing it does is to take all of it out of the garbage collector's sight. A collection in a forked process would
otherwise write to every object, and so copy the whole heap.
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
