"""Hide transformers' progress bars and advice while something loads."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet_transformers(*, with_bars: bool = False) -> Iterator[None]:
    """Silence transformers except for errors; restore its verbosity and bars afterwards.

    Parameters
    ----------
    with_bars : whether its progress bars stay
    """
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if not with_bars:
        logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
