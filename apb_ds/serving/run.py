"""A server from its config to its end."""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import BaseFileLock, FileLock, Timeout

from apb_ds.config import from_mapping
from apb_ds.engine.engine import APBEngine
from apb_ds.engine.loaded import read_manifest
from apb_ds.loading import ModelConfig
from apb_ds.ops.memory import available_bytes
from apb_ds.parallel.consistency import describe_software, shared_validation
from apb_ds.parallel.failure.ending import Watch
from apb_ds.parallel.failure.reports import RESTART
from apb_ds.parallel.groups import SequenceGroup, world_group
from apb_ds.parallel.launcher import ranks_on_node
from apb_ds.parallel.pipeline import Pipeline
from apb_ds.report.results import flatten
from apb_ds.serving.config import ServeConfig, name_template
from apb_ds.serving.documents import Documents, Limits, Place
from apb_ds.serving.errors import unavailable
from apb_ds.serving.warm_up import warm_up
from apb_ds.serving.worker import Worker
from apb_ds.session.job import EngineSettings, read_engine_settings
from apb_ds.session.model_in_use import ModelInUse
from apb_ds.session.steps import Steps
from apb_ds.tasks.template import with_template
from apb_ds.tasks.text import expand_path

SECTIONS = ("model", "method", "parallel", "serve", "seed", "debug")
FIRST_RANKS_VALUES = ("serve.host", "serve.port", "serve.api_key", "debug")
# Of the memory that is free once the model is loaded. A prefill needs the rest.
DEVICE_SHARE = 0.5
ANSWERS_SHARE = 0.15
CONVERSATIONS_SHARE = 0.2  # of what documents and conversations have
OTHER_SHARE = 0.5  # of host memory, and of the disk
# Beyond the seconds that answers get: to tell clients, and to leave the group.
LEAVING_S = 4.0
GIB = 2**30
LOCK = "lock"
KEY = re.compile(r"[0-9a-f]{64}")
# What a server may remove: documents, and what was left when one was being saved.
OURS = re.compile(r"[0-9a-f]{64}|\.[0-9a-f]{64}\.[0-9a-f]+\.(partial|before)")
FAILED = "The server has failed; try again once it has been started anew."


@dataclass(frozen=True)
class ServeSettings:
    """The settings of a server, validated."""

    engine: EngineSettings
    serve: ServeConfig


def read_serve_settings(values: dict[str, Any]) -> ServeSettings:
    """Validate a composed config, as far as possible without a model; ValueError or RuntimeError."""
    # A file of the exp group sets the task's length, too, which says nothing to a server.
    values = {name: value for name, value in values.items() if name != "task"}
    serve = from_mapping(ServeConfig, dict(values.get("serve") or {}), "serve")
    engine = read_engine_settings(values, SECTIONS)
    if engine.stages > 1 and serve.cache_dir is not None:
        raise ValueError(
            f"serve.cache_dir={serve.cache_dir!r} keeps documents on disk, which is not possible with "
            f"parallel.stages={engine.stages}; leave one of them out."
        )
    return ServeSettings(engine, serve)


def serve(values: dict[str, Any], watch: Watch, say: Callable[[str], None]) -> None:
    """Serve as a composed config says, all ranks together, until somebody ends it.

    Parameters
    ----------
    watch : the process's, which follows the group
    say : called with lines for people, on the first rank

    Raises
    ------
    ValueError, RuntimeError
        For settings out of their range, on every rank, before the ranks meet.
    JobError
        If the model cannot be loaded or served, or the port is taken.
    """
    settings = read_serve_settings(values)
    config = settings.serve
    group = world_group(settings.engine.timeout_s, watch)
    if group.board is not None:
        group.board.advice = RESTART
    with shared_validation(group, "the server") as comparison:
        shared = {name: value for name, value in flatten(values).items() if name not in FIRST_RANKS_VALUES}
        comparison.facts = {**shared, **describe_software()}
    group.set_timeout(settings.engine.timeout_s)
    steps = Steps(group, debug=bool(values.get("debug")))
    bound: socket.socket | None = None

    def bind() -> None:
        """Find out what would fail on the first rank, before the model is loaded."""
        nonlocal bound
        bound = _bind(config)

    steps.from_first(bind)
    pipeline = Pipeline.of(group, settings.engine.stages) if settings.engine.stages > 1 else None
    holders = (group if pipeline is None else pipeline.ranks).part(settings.engine.shard_ranks)
    model = steps.together(lambda: ModelInUse(settings.engine.model, None, holders, pipeline), local=True)
    steps.together(lambda: model.load_heads(settings.engine), local=True)
    engine = steps.together(lambda: _engine(model, settings, group))
    name = config.model_name or _model_name(settings.engine.model)
    cache_dir = None
    if config.cache_dir is not None:
        parent = expand_path("serve.cache_dir", config.cache_dir).resolve()
        cache_dir = parent / f"apb_ds-{re.sub(r'[^0-9A-Za-z_.-]', '_', name)}"
    if cache_dir is not None:
        steps.from_first(functools.partial(make_folder, cache_dir))
    limits, max_bytes = steps.together(lambda: _limits(engine, config, cache_dir))
    control = group.on_cpu(settings.engine.timeout_s)
    server: _Server | None = None

    def open_server() -> None:
        """Make what only the first rank has."""
        nonlocal server
        server = _open(engine, model, name, config, limits, max_bytes, cache_dir, bound)

    steps.from_first(open_server)
    worker = Worker(
        engine,
        control,
        None if server is None else server.service,
        max_sequences=config.max_sequences,
        max_bytes=max_bytes,
        step_every_s=config.step_every_s,
        cache_dir=cache_dir,
    )
    try:
        if server is not None:
            watch.add_cleanup(functools.partial(server.fail, unavailable(FAILED)))
        if config.warm_up and engine.device.type != "cpu":
            warm_up(engine, max_bytes)
        if server is not None:
            ranks = f"{group.world_size} rank{'s' if group.world_size > 1 else ''}"
            say(f"Serving {server.service.model_name} at {server.address}, on {ranks}. Ctrl-C ends it.")
            say(_describe(server.service, limits, max_bytes))
            server.service.on_stop = functools.partial(
                say, f"Ending; what is under way has {config.stop_s:g} s (serve.stop_s). Ctrl-C again ends at once."
            )
        with watch.ending_gracefully(worker.stop, config.stop_s + LEAVING_S):
            worker.run()
    except BaseException:
        if server is not None:
            server.fail(unavailable(FAILED))
        raise
    if server is not None:
        server.stop()
        say("The server has ended.")


class _Server:
    """What listens, and what answers, on the first rank."""

    def __init__(self, service: Any, http: Any, lock: BaseFileLock | None) -> None:
        self.service = service
        self.http = http
        self._lock = lock  # held until the server has ended

    @property
    def address(self) -> str:
        return str(self.http.address)

    def fail(self, error: Any) -> None:
        """Tell all clients that the engine is gone."""
        self.service.fail(error)
        self.http.stop(LEAVING_S / 2)

    def stop(self) -> None:
        """Close, once all answers have ended."""
        self.http.stop(LEAVING_S / 2)
        if self._lock is not None:
            self._lock.release()


def _describe(service: Any, limits: Limits, max_bytes: int) -> str:
    """Return what the server keeps, for people."""
    if service.longest_document < service.min_document:
        return (
            f"No document is served: there is room for {service.longest_document} tokens (serve.device_gib), and "
            f"serve.min_document={service.min_document}."
        )
    places = [f"{limits.device / GIB:.2f} GiB on a rank's device"]
    places += [f"{limits.host / GIB:.2f} GiB in host memory"] if limits.host else []
    if limits.disk:
        places.append(f"{limits.disk / GIB:.2f} GiB on disk ({len(service.documents.files())} found there)")
    return (
        f"Documents of {service.min_document:,} to {service.longest_document:,} tokens are kept: {', '.join(places)}. "
        f"Conversations: {limits.conversations / GIB:.2f} GiB; answers: {max_bytes / GIB:.2f} GiB."
    )


def _model_name(config: ModelConfig) -> str:
    """Return a model's name for clients: that of its folder or file."""
    return Path(config.path).name.removesuffix(".gguf") if config.path else "model"


def _bind(config: ServeConfig) -> socket.socket:
    """Return a socket at the server's port; ValueError if that is taken, or a package is missing."""
    try:
        from apb_ds.serving.app import bind
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("apb_ds"):
            raise
        raise ValueError(
            f"serving needs the package {error.name}; install the extra [serve], as in: pip install '.[serve]'"
        ) from error
    return bind(config)


def _open(
    engine: APBEngine,
    model: ModelInUse,
    name: str,
    config: ServeConfig,
    limits: Limits,
    max_bytes: int,
    cache_dir: Path | None,
    bound: Any,
) -> _Server:
    """Return the server on the first rank, listening; ValueError for settings that do not fit it or the model."""
    from apb_ds.serving.app import HttpServer, create_app
    from apb_ds.serving.metrics import Metrics
    from apb_ds.serving.service import Service, document_bytes

    tokenizer = model.loaded.tokenizer
    if tokenizer is None:
        raise ValueError("a server needs a tokenizer, and this model has none; set model.tokenizer.")
    try:
        with_template(tokenizer, None, config.template)
    except ValueError as error:
        raise ValueError(name_template(error)) from error
    documents = Documents(limits)
    lock = None if cache_dir is None else take_over(cache_dir, documents, functools.partial(document_bytes, engine))
    metrics = Metrics()
    service = Service(engine, tokenizer, name, config, documents, max_bytes, metrics)
    http = HttpServer(create_app(service, config, metrics), config, bound)
    http.start()
    return _Server(service, http, lock)


def make_folder(cache_dir: Path) -> None:
    """Make the folder for documents, readable by its owner alone, unless it is there; ValueError if that fails."""
    try:
        cache_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise _not_usable(cache_dir, error) from error


def _not_usable(cache_dir: Path, error: OSError) -> ValueError:
    return ValueError(f"serve.cache_dir={cache_dir.parent}: cannot use {cache_dir} ({error.strerror}).")


def take_over(cache_dir: Path, documents: Documents, bytes_of: Callable[[int], int]) -> BaseFileLock:
    """Enter the documents that an earlier server left on disk, the latest first, and remove what has no room.

    Parameters
    ----------
    bytes_of : bytes of a document of so many tokens, on the rank that stores most of it

    Raises
    ------
    ValueError
        If another server uses the folder, or nothing can be written there.
    """
    lock = FileLock(cache_dir / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"serve.cache_dir={cache_dir.parent} is used by another server of this model.") from error
    except OSError as error:
        raise _not_usable(cache_dir, error) from error
    ours = [path for path in cache_dir.iterdir() if path.is_dir() and OURS.fullmatch(path.name)]
    kept: list[tuple[str, int, int]] = []
    for path in sorted(ours, key=lambda path: path.stat().st_mtime, reverse=True):
        with contextlib.suppress(ValueError):
            num_tokens = read_manifest(path).document_tokens
            num_bytes = bytes_of(num_tokens)
            total = num_bytes + sum(others for _, _, others in kept)
            if KEY.fullmatch(path.name) and total <= documents.limits.disk:
                kept.append((path.name, num_tokens, num_bytes))
                continue
        shutil.rmtree(path, ignore_errors=True)
    for document in reversed(kept):
        documents.add(*document, place=Place.DISK)
    return lock


def _engine(model: ModelInUse, settings: ServeSettings, group: SequenceGroup) -> APBEngine:
    engine: APBEngine = model.engine(settings.engine.method, group, settings.engine.timeout_s)
    if engine.attention.needs_query:
        raise ValueError(
            f"method.compressor={engine.apb_config.compressor} scores with the query, and a server prefills documents "
            "before it knows what is asked; use another compressor."
        )
    return engine


def _limits(engine: APBEngine, config: ServeConfig, cache_dir: Path | None) -> tuple[Limits, int]:
    """Return what documents and answers may take, on each rank; the same on all of them."""
    sharing = ranks_on_node() if engine.device.type == "cpu" else 1
    host = available_bytes(torch.device("cpu")) // ranks_on_node() if engine.device.type != "cpu" else 0
    disk = 0
    if cache_dir is not None:
        held = sum(file.stat().st_size for file in cache_dir.rglob("*") if file.is_file())
        disk = (shutil.disk_usage(cache_dir).free + held) // engine.group.world_size
    free = available_bytes(engine.device) // sharing
    everyone = engine.group.gather_objects((free, host, disk))
    free, host, disk = (min(of_rank[kind] for of_rank in everyone) for kind in range(3))
    device = _bytes(config.device_gib, free * DEVICE_SHARE)
    conversations = int(device * CONVERSATIONS_SHARE)
    limits = Limits(
        device=device - conversations,
        host=_bytes(config.host_gib, host * OTHER_SHARE),
        disk=_bytes(config.disk_gib, disk * OTHER_SHARE) if cache_dir is not None else 0,
        conversations=conversations,
    )
    return limits, int(free * ANSWERS_SHARE)


def _bytes(gib: float | None, otherwise: float) -> int:
    return int(otherwise if gib is None else gib * GIB)
