"""What surrounds every call of an engine: one at a time on a model, in eval mode, and no reader left waiting."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from apb_ds.hf.architecture import walk

_locks: weakref.WeakKeyDictionary[nn.Module, threading.RLock] = weakref.WeakKeyDictionary()
_locks_lock = threading.Lock()


@contextmanager
def exclusive_call(model: nn.Module) -> Iterator[None]:
    """Run one call on a model at a time, whichever engine makes it, in eval mode and without gradients.

    Inference mode is left, too, if the caller is in it: a context's tensors are changed later, perhaps outside of it.
    """
    with _locks_lock:
        lock = _locks.setdefault(model, threading.RLock())
    with lock, torch.inference_mode(False), torch.no_grad():
        training = [module for module in walk(model) if module.training]
        for module in training:
            vars(module)["training"] = False  # as `module.training = False`, which takes far longer for a whole model
        try:
            yield
        finally:
            for module in training:
                vars(module)["training"] = True


@contextmanager
def ended_after_errors(streamer: Any) -> Iterator[None]:
    """End a streamer if generation fails, so that its reader does not wait forever."""
    try:
        yield
    except BaseException:
        if streamer is not None:
            streamer.end()
        raise
