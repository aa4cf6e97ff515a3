"""What libraries print: nothing but errors; with debug=true warnings and what DeepSpeed logs, too."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import sys
import warnings


def quiet_environment(debug: bool) -> None:
    """Tell libraries by environment variables to be quiet, where the user has not set these."""
    defaults = {
        "TRANSFORMERS_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    if not debug and not sys.warnoptions:
        warnings.simplefilter("ignore")


def quiet_imports(debug: bool) -> None:
    """Import deepspeed; unless for debugging without its output, its log limited to errors, on standard error."""
    if debug:
        import deepspeed

        return
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        import deepspeed  # noqa: F401
    for name in ("DeepSpeed", "torch.distributed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    for handler in logging.getLogger("DeepSpeed").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.stream = sys.stderr  # setStream would flush the old stream, which may be closed
