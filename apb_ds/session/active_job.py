"""A job being served: settings put into the engine, a document prefilled, a query answered."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TextIO

import torch
from rich.console import Console
from torch import Tensor

from apb_ds.config import EXECUTION_DEFAULTS, APBConfig
from apb_ds.engine.context import Context
from apb_ds.loading import LoadedModel
from apb_ds.parallel.groups import SequenceGroup
from apb_ds.plan import Plan, plan_request
from apb_ds.session.job import Job, Settings
from apb_ds.session.metrics import Usage
from apb_ds.session.model_in_use import ModelInUse
from apb_ds.session.steps import Steps
from apb_ds.tasks import Sample

# Settings that may differ between jobs without changing the answers.
IRRELEVANT_METHOD_KEYS = ("schedule", "hosts_per_round", "shard_anchor", *EXECUTION_DEFAULTS)
IRRELEVANT_TASK_KEYS = ("input", "output", "overwrite", "sequences")
RELEVANT_MODEL_KEYS = ("path", "tokenizer", "adapter", "load_format", "num_layers", "overrides")


@dataclass
class Answer:
    """The answer to one query, as this rank measured it.

    Attributes
    ----------
    tokens : generated ids, the same on every rank
    query_s, decode_s : seconds until the first token, and of all further ones
    """

    tokens: list[int]
    query_s: float
    decode_s: float


@dataclass
class ActiveJob:
    """What serving a job needs.

    Attributes
    ----------
    error_console, stdin : where the first rank shows progress, and reads questions
    engine : with the settings of the latest `set_up`; None before
    so_far : parts of the record, for a job that ends early
    """

    job: Job
    settings: Settings
    steps: Steps
    model: ModelInUse
    error_console: Console
    stdin: TextIO
    engine: Any = field(default=None, init=False)
    so_far: dict[str, Any] = field(default_factory=dict, init=False)

    @property
    def group(self) -> SequenceGroup:
        return self.steps.group

    @property
    def loaded(self) -> LoadedModel:
        return self.model.loaded

    @property
    def is_first(self) -> bool:
        return self.group.is_first

    @property
    def device(self) -> torch.device:
        return self.loaded.device

    @property
    def tokenizer(self) -> Any:
        return self.loaded.tokenizer

    @functools.cached_property
    def chat_tokenizer(self) -> Any:
        """The tokenizer with the task's system prompt and template arguments, for the first rank: it reads texts."""
        return self.settings.task.chat_tokenizer(self.tokenizer)

    @property
    def vocab_size(self) -> int:
        return self.loaded.model.get_input_embeddings().num_embeddings

    @property
    def max_positions(self) -> int | None:
        """The model's positions, None if its config sets no limit."""
        return getattr(self.loaded.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def num_sharing(self) -> int:
        """How many ranks share a document: those of a stage, where the model is cut into stages."""
        return self.group.world_size // self.settings.stages

    def track_usage(self) -> Usage:
        """Start to count bytes sent and peak memory."""
        return Usage(self.group, self.device)

    def sample_from_first(self, make: Callable[[], Sample]) -> Sample:
        """Return the sample that the first rank makes: it alone reads and tokenises text, and sends the ids."""
        made: Sample | None = None

        def header() -> tuple[Sample, dict[str, int]]:
            nonlocal made
            made = make()
            lengths = {name: ids.shape[1] for name, ids in _ids_of(made).items()}
            nothing: Any = torch.empty((1, 0), dtype=torch.int64)
            return replace(made, **dict.fromkeys(lengths, nothing)), lengths

        sample, lengths = self.steps.from_first(header)
        ids = None if made is None else torch.cat(list(_ids_of(made).values()), dim=1)
        ids = self.steps.ids_from_first(ids, sum(lengths.values()), self.device)
        parts: Any = dict(zip(lengths, ids.split(list(lengths.values()), dim=1), strict=True))
        return replace(sample, **parts)

    def set_up(self, query_position: int, num_document: int, num_query: int) -> APBConfig:
        """Prepare the engine for a document of this length; return the settings in force.

        Parameters
        ----------
        num_query : tokens that the anchor embeds

        Raises
        ------
        ValueError
            If the lengths do not fit the settings.
        """
        method = self.settings.method_for(query_position)
        plan_request(method, num_document, num_query, self.num_sharing)
        self.engine = self.make_engine(method)
        return method

    def plan(self, num_document: int, num_query: int) -> Plan:
        """Return how the settings in force split a document; see `set_up`."""
        return plan_request(self.engine.apb_config, num_document, num_query, self.num_sharing)

    def make_engine(self, method: APBConfig) -> Any:
        """Return the session's engine, with these settings in force."""
        return self.model.engine(method, self.group, self.settings.timeout_s)

    def set_up_for(self, sample: Sample) -> APBConfig:
        """Prepare the engine for a sample, see `set_up`."""
        return self.set_up(sample.query_position, sample.num_document, sample.anchor_query_ids.shape[1])

    def prefill(self, sample: Sample, progress: Any) -> Context:
        """Prefill a sample's document, with positions for its query and answer."""
        return self.engine.prefill(
            sample.document_ids, sample.anchor_query_ids, max_positions=sample.num_positions, progress=progress
        )

    def answer(
        self, context: Context, query_ids: Tensor, max_new_tokens: int, arguments: dict[str, Any], **options: Any
    ) -> Answer:
        """Answer a query about a prefilled document.

        Parameters
        ----------
        arguments : as in `Sample.generate`
        options : ``streamer`` and ``append``, see `APBEngine.generate`
        """
        arguments = self.generate_arguments(arguments)
        tokens = self.engine.generate(
            query_ids=query_ids, context=context, max_new_tokens=max_new_tokens, **arguments, **options
        )
        stats = self.engine.stats
        return Answer(tokens[0].tolist(), stats.query_s, stats.decode_s)

    def answer_sample(self, context: Context, sample: Sample, **options: Any) -> Answer:
        """Answer a sample's query, see `answer`."""
        return self.answer(context, sample.query_ids, sample.max_new_tokens, sample.generate, **options)

    def generate_arguments(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return a sample's arguments of `APBEngine.generate` with those that all have."""
        return {"do_sample": False, "tokenizer": self.tokenizer, **arguments}

    def answer_settings(self) -> dict[str, Any]:
        """Return the settings that answers depend on: a resumed job must share them with the one before it.

        For the first rank: a system prompt may be a file.
        """
        method = self.settings.method.resolved()
        for name in IRRELEVANT_METHOD_KEYS:
            method.pop(name)
        if self.settings.position_from_template:
            method["query_position"] = None
        model = asdict(self.settings.model)
        dtype = str(self.loaded.dtype).removeprefix("torch.")
        task: Any = self.settings.task  # every subclass is a dataclass
        values = {name: value for name, value in asdict(task).items() if name not in IRRELEVANT_TASK_KEYS}
        for name in ("system", "template"):
            if not values.get(name):
                values.pop(name, None)
        if "system" in values:
            values["system"] = task.read_system()  # not the name of a file, which may change
        if self.settings.retaining_heads is not None:
            method["retaining_heads"] = self.settings.retaining_heads
        return {
            "model": {name: model[name] for name in RELEVANT_MODEL_KEYS} | {"dtype": dtype},
            "method": method,
            "task": values,
            "seed": self.settings.seed,
        }

    def seed_of(self, salt: str) -> int:
        """Return the seed of an answer's sampling: `salt` makes it differ between answers, but not between runs."""
        return self.settings.seed + zlib.crc32(salt.encode())

    def seed_everything(self) -> None:
        """Seed the sampling of tokens."""
        torch.manual_seed(self.settings.seed)

    def text_of(self, tokens: list[int]) -> str:
        """Return generated ids as text, or as numbers without a tokenizer."""
        if self.tokenizer is None:
            return " ".join(map(str, tokens))
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def streamer(self) -> Any:
        """Return what prints an answer to standard output as it is generated; None on ranks other than the first."""
        from transformers import TextStreamer

        if not self.is_first or self.tokenizer is None:
            return None
        return TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)


def _ids_of(sample: Sample) -> dict[str, Tensor]:
    """Return the ids of a sample, by field."""
    ids = {"document_ids": sample.document_ids, "query_ids": sample.query_ids, "embedded_ids": sample.embedded_ids}
    return {name: tensor for name, tensor in ids.items() if tensor is not None}
