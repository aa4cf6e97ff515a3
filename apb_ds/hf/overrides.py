"""Temporary replacements that only the calling context sees.

While a call of the engine is in progress, parts of its model compute otherwise: attention, MLPs, norms, rotations.
Other threads that run the same model meanwhile must get the model as it is. So what is put in place of a function is a
dispatcher, which looks into a context variable: where an override is in force it calls that, elsewhere the original.
Dispatchers are counted, so that calls that overlap in time leave everything as it was.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

from transformers import PretrainedConfig

Function = Callable[..., Any]
Namespace = dict[str, Any]  # a module's __dict__, an nn.Module's or a Python module's
Override = tuple[Namespace, str, Function, Callable[[Function], Function]]  # where, name, what is there, what to make
_Key = tuple[int, str]

_OVERRIDES: ContextVar[Mapping[_Key, Function]] = ContextVar("apb_ds_overrides", default=MappingProxyType({}))
_IMPLEMENTATION: ContextVar[tuple[frozenset[int], str] | None] = ContextVar("apb_ds_implementation", default=None)
_lock = threading.Lock()
_dispatchers: dict[_Key, _Dispatcher] = {}
_num_implementations = 0
_MISSING = object()


class _Dispatcher:
    """Calls the override that is in force in this context, else what it stands for."""

    def __init__(self, key: _Key, original: Function, before: object) -> None:
        self.key = key
        self.original = original
        self.before = before
        self.count = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _OVERRIDES.get().get(self.key, self.original)(*args, **kwargs)


@contextmanager
def overridden(overrides: Iterable[Override]) -> Iterator[None]:
    """Put functions in place of others, for this context alone; restore them on leaving.

    Each override is (namespace, name, function, make): ``make`` gets what the context calls so far, the function or an
    override of it, and returns what it is to call instead.
    """
    overrides = list(overrides)
    keys: list[_Key] = []
    in_force = dict(_OVERRIDES.get())
    try:
        for namespace, name, function, make in overrides:
            key = (id(namespace), name)
            if isinstance(function, _Dispatcher):  # of another call, which may end now
                function = function.original
            with _lock:
                dispatcher = _dispatchers.get(key)
                if dispatcher is None:
                    dispatcher = _Dispatcher(key, function, namespace.get(name, _MISSING))
                    _dispatchers[key] = namespace[name] = dispatcher
                dispatcher.count += 1
            keys.append(key)
            in_force[key] = make(in_force.get(key, dispatcher.original))
        token = _OVERRIDES.set(in_force)
        try:
            yield
        finally:
            _OVERRIDES.reset(token)
    finally:
        for key, (namespace, name, _, _) in zip(keys, overrides, strict=False):
            with _lock:
                dispatcher = _dispatchers[key]
                dispatcher.count -= 1
                if dispatcher.count:
                    continue
                del _dispatchers[key]
                if dispatcher.before is _MISSING:
                    del namespace[name]
                else:
                    namespace[name] = dispatcher.before


@contextmanager
def without_overrides() -> Iterator[None]:
    """Have this context call the originals, for a forward inside another one whose overrides are not for it."""
    token = _OVERRIDES.set(MappingProxyType({}))
    try:
        yield
    finally:
        _OVERRIDES.reset(token)


def forward_override(module: Any, make: Callable[[Function], Function]) -> Override:
    """Return the override of a module's forward by what `make` makes of it."""
    return module.__dict__, "forward", module.forward, make


def forward_replacement(module: Any, forward: Function) -> Override:
    """Return the override of a module's forward by another one."""
    return forward_override(module, lambda _: forward)


def has_other_forward(module: Any) -> bool:
    """Whether the module's forward was replaced by something else than an override."""
    return not isinstance(module.__dict__.get("forward", None), (_Dispatcher, type(None)))


@contextmanager
def attention_implementation(configs: Iterable[PretrainedConfig], name: str) -> Iterator[None]:
    """Have these configs name another attention implementation, for this context alone.

    The configs themselves are not changed: what their `_attn_implementation` property returns is.
    """
    token = _IMPLEMENTATION.set((frozenset(map(id, configs)), name))
    _patch_configs(1)
    try:
        yield
    finally:
        _patch_configs(-1)
        _IMPLEMENTATION.reset(token)


_original: Any = PretrainedConfig._attn_implementation


def _get_implementation(config: PretrainedConfig) -> Any:
    in_force = _IMPLEMENTATION.get()
    if in_force is not None and id(config) in in_force[0]:
        return in_force[1]
    return _original.fget(config)


def _patch_configs(change: int) -> None:
    global _num_implementations
    with _lock:
        _num_implementations += change
        patched = property(_get_implementation, _original.fset) if _num_implementations else _original
        setattr(PretrainedConfig, "_attn_implementation", patched)  # noqa: B010 (mypy takes it for a method)
