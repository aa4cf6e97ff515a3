"""Run a decoder's norms, gated activations and rotations with one kernel each instead of five or ten; reversible.

Model code is never copied: a module is recognised by its parts (`weight` and an epsilon; gate, up and down
projections), and replaced only if its own forward gives the same numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from apb_ds.hf.architecture import attention_modules
from apb_ds.hf.overrides import forward_replacement, has_other_forward, overridden
from apb_ds.ops.compiled import can_compile, compiled, rms_norm, rms_norm_around_one

EPSILONS = ("variance_epsilon", "eps")
ROTATION = "apply_rotary_pos_emb"
ACTIVATIONS = ("act_fn", "activation_fn")
# Tokens of the trial input that shows whether a module computes what its parts suggest.
TRIED_TOKENS = 3
# Relative, over all numbers: allows rounding in another order, but not another formula.
TOLERANCES = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}

Forward = Callable[[Tensor], Tensor]


class FusedLayers:
    """The layers of a model that can be fused, found once.

    Parameters
    ----------
    model : transformers decoder, on its device

    Attributes
    ----------
    counts : how many norms, MLPs and rotations are replaced
    """

    def __init__(self, model: nn.Module) -> None:
        self._forwards: list[tuple[nn.Module, Forward]] = []
        self.counts = {"norms": 0, "mlps": 0, "rotations": 0}
        verdicts: dict[tuple[Any, ...], bool] = {}
        for module in model.modules():
            for name, make in FORWARDS:
                forward = make(module)
                if forward is not None and _is_same(module, make, forward, verdicts):
                    self._forwards.append((module, forward))
                    self.counts[name] += 1
                    break
        names = {type(module).__module__ for module in attention_modules(model).values()}  # type: ignore[arg-type]
        self._namespaces = [vars(sys.modules[name]) for name in sorted(names) if ROTATION in vars(sys.modules[name])]
        self.counts["rotations"] = len(self._namespaces)

    @contextmanager
    def in_force(self) -> Iterator[None]:
        """Have the model compute with fused layers in this context; restore it on leaving."""
        layers = [
            forward_replacement(module, forward) for module, forward in self._forwards if not has_other_forward(module)
        ]
        rotations = [(space, ROTATION, space[ROTATION], compiled) for space in self._namespaces]
        with overridden([*layers, *rotations]):
            yield


def _norm_forward(module: nn.Module, norm: Callable[..., Tensor] = rms_norm) -> Forward | None:
    """Return an RMS norm's forward, if the module looks like one."""
    weight = getattr(module, "weight", None)
    eps = next((getattr(module, name) for name in EPSILONS if isinstance(getattr(module, name, None), float)), None)
    if not isinstance(weight, nn.Parameter) or weight.dim() != 1 or eps is None or list(module.children()):
        return None
    return lambda hidden: compiled(norm)(hidden, module.weight, eps)


def _norm_around_one_forward(module: nn.Module) -> Forward | None:
    """Return the forward of an RMS norm whose weights are differences to one, as Gemma's are, likewise."""
    return _norm_forward(module, rms_norm_around_one)


def _mlp_forward(module: nn.Module) -> Forward | None:
    """Return a gated MLP's forward, if the module looks like one."""
    activation = next((getattr(module, name) for name in ACTIVATIONS if callable(getattr(module, name, None))), None)
    down = getattr(module, "down_proj", None)
    has_state = isinstance(activation, nn.Module) and bool(activation.state_dict())
    if activation is None or has_state or not isinstance(down, nn.Module):
        return None
    gated = compiled(_gate_of(activation))
    gate, up, both = (getattr(module, name, None) for name in ("gate_proj", "up_proj", "gate_up_proj"))
    if isinstance(gate, nn.Module) and isinstance(up, nn.Module):
        return lambda hidden: down(gated(gate(hidden), up(hidden)))
    if isinstance(both, nn.Module):
        return lambda hidden: down(gated(*both(hidden).chunk(2, dim=-1)))
    return None


_GATES: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {}


def _gate_of(activation: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Return ``activation(gate) * up``, one function for all layers with the same activation and settings."""
    kind = activation
    if isinstance(activation, nn.Module):
        settings = sorted((name, repr(value)) for name, value in vars(activation).items() if not name.startswith("_"))
        kind = (type(activation), tuple(settings))
    return _GATES.setdefault(kind, lambda gate, up: activation(gate) * up)


FORWARDS: tuple[tuple[str, Callable[[nn.Module], Forward | None]], ...] = (
    ("norms", _norm_forward),
    ("norms", _norm_around_one_forward),
    ("mlps", _mlp_forward),
)


@torch.no_grad()
def _is_same(module: nn.Module, make: Any, forward: Forward, verdicts: dict[tuple[Any, ...], bool]) -> bool:
    """Whether the module's own forward gives what `forward` does; tried once per class and shapes."""
    shapes = tuple((name, tuple(parameter.shape)) for name, parameter in module.named_parameters())
    key = (type(module), make, shapes)
    if key not in verdicts:
        verdicts[key] = _gives_the_same(module, forward)
    return verdicts[key]


def _gives_the_same(module: nn.Module, forward: Forward) -> bool:
    first = next(module.parameters())
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, TRIED_TOKENS, first.shape[-1], generator=generator).to(first.device, first.dtype)
    try:
        expected, ours = type(module).forward(module, hidden), forward(hidden)
    except (RuntimeError, TypeError):  # it does not take hidden states alone
        return False
    if not isinstance(expected, Tensor) or expected.shape != ours.shape:
        return False
    tolerance = TOLERANCES.get(first.dtype, 0.0)
    return bool((ours - expected).float().norm() <= tolerance * expected.float().norm())


def fused_layers(model: nn.Module, enabled: bool, device: torch.device) -> FusedLayers | None:
    """Return a model's fused layers; None if switched off, not on CUDA, or without a compiler."""
    return FusedLayers(model) if enabled and device.type == "cuda" and can_compile(device) else None
