"""Adapters that peft has put into a model, and that its user switches between requests."""

from __future__ import annotations

import sys

from torch import nn

from apb_ds.hf.architecture import walk


def adapters_in_force(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the adapters that a forward now applies, in alphabetical order; none without peft."""
    names: set[str] = set()
    if "peft" not in sys.modules:
        return ()
    for module in walk(model):
        # The attributes of peft's tuner layers. One that is merged is applied whichever are active.
        if "merged_adapters" not in vars(module) or getattr(module, "disable_adapters", True):
            continue
        names.update(module.merged_adapters or module.active_adapters)  # type: ignore[arg-type]
    return tuple(sorted(names))


def check_adapters(model: nn.Module, of_context: tuple[str, ...]) -> None:
    """Raise ValueError unless a context's adapters are those that are now in force."""
    now = adapters_in_force(model)
    if of_context != now:
        raise ValueError(
            f"context was prefilled with {name_adapters(of_context)}, and the model now has {name_adapters(now)}. "
            "Switch back, or prefill the document again."
        )


def name_adapters(names: tuple[str, ...]) -> str:
    """Return the adapters as messages name them."""
    if not names:
        return "no adapter"
    return f"adapter{'s' if len(names) > 1 else ''} {', '.join(map(repr, names))}"
