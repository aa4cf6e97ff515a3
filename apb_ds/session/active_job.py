"""One job's requests: settings put into the engine, a document prefilled, a query answered."""

from __future__ import annotations

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
from apb_ds.plan import plan_request
from apb_ds.report.flops import ModelSizes, count_flops
from apb_ds.report.record import rate
from apb_ds.session.job import Job, Settings
from apb_ds.session.steps import Steps, gather_numbers
from apb_ds.tasks import Sample

# What a run can change without changing what is answered.
IRRELEVANT_METHOD_KEYS = ("schedule", "hosts_per_round", "shard_anchor", *EXECUTION_DEFAULTS)
IRRELEVANT_TASK_KEYS = ("input", "output", "overwrite")
RELEVANT_MODEL_KEYS = ("path", "tokenizer", "adapter", "load_format", "num_layers", "overrides")


@dataclass
class Answer:
    """What one query gave on this rank.

    Attributes
    ----------
    tokens : generated ids, the same on every rank
    query_s, decode_s : seconds until the first token, and of all further ones
    """

    tokens: list[int]
    query_s: float
    decode_s: float


@dataclass
class Run:
    """What serving a job needs.

    Attributes
    ----------
    make_engine : returns the session's engine with the given settings in force
    console, error_console, stdin : where the first rank prints and reads
    """

    job: Job
    settings: Settings
    steps: Steps
    loaded: LoadedModel
    make_engine: Callable[[APBConfig], Any]
    console: Console
    error_console: Console
    stdin: TextIO
    engine: Any = field(default=None, init=False)

    @property
    def group(self) -> SequenceGroup:
        return self.steps.group

    @property
    def is_first(self) -> bool:
        return self.group.is_first

    @property
    def tokenizer(self) -> Any:
        return self.loaded.tokenizer

    @property
    def vocab_size(self) -> int:
        return self.loaded.model.get_input_embeddings().num_embeddings

    def sample_from_first(self, make: Callable[[], Sample]) -> Sample:
        """Return the sample that the first rank makes: text is read and tokenised there alone, ids are sent."""
        made: Sample | None = None

        def header() -> tuple[Sample, dict[str, int]]:
            nonlocal made
            made = make()
            lengths = {name: ids.shape[1] for name, ids in _ids_of(made).items()}
            nothing: Any = torch.empty((1, 0), dtype=torch.int64)
            return replace(made, **dict.fromkeys(lengths, nothing)), lengths

        sample, lengths = self.steps.from_first(header)
        ids = None if made is None else torch.cat(list(_ids_of(made).values()), dim=1)
        ids = self.steps.ids_from_first(ids, sum(lengths.values()), self.loaded.device)
        parts: Any = dict(zip(lengths, ids.split(list(lengths.values()), dim=1), strict=True))
        return replace(sample, **parts)

    def set_up(self, query_position: int, num_document: int, num_query: int) -> APBConfig:
        """Have the engine ready for a document of this length; return the settings in force.

        Parameters
        ----------
        num_query : tokens that the anchor embeds

        Raises
        ------
        ValueError
            If the lengths do not fit the settings.
        """
        method = self.settings.method_for(query_position)
        plan_request(method, num_document, num_query, self.group.world_size)
        self.engine = self.make_engine(method)
        return method

    def answer(
        self, context: Context, query_ids: Tensor, max_new_tokens: int, arguments: dict[str, Any], **options: Any
    ) -> Answer:
        """Answer a query about a prefilled document.

        Parameters
        ----------
        arguments : as in `Sample.generate`
        options : ``streamer`` and ``append``, see `APBEngine.generate`
        """
        arguments = {"do_sample": False, "tokenizer": self.tokenizer, **arguments}
        tokens = self.engine.generate(
            query_ids=query_ids, context=context, max_new_tokens=max_new_tokens, **arguments, **options
        )
        stats = self.engine.stats
        return Answer(tokens[0].tolist(), stats.query_s, stats.decode_s)

    def answer_settings(self) -> dict[str, Any]:
        """Return the settings that answers depend on: what a resumed run must share with the one before it."""
        method = self.settings.method.resolved()
        for name in IRRELEVANT_METHOD_KEYS:
            method.pop(name)
        if self.settings.position_from_template:
            method["query_position"] = None
        model = asdict(self.settings.model)
        dtype = str(self.loaded.dtype).removeprefix("torch.")
        task: Any = self.settings.task  # a dataclass, whatever its class
        if self.settings.retaining_heads is not None:
            method["retaining_heads"] = self.settings.retaining_heads
        return {
            "model": {name: model[name] for name in RELEVANT_MODEL_KEYS} | {"dtype": dtype},
            "method": method,
            "task": {name: value for name, value in asdict(task).items() if name not in IRRELEVANT_TASK_KEYS},
            "seed": self.settings.seed,
        }

    def seed_everything(self, salt: str = "") -> None:
        """Seed the drawing of tokens; `salt` makes it differ from answer to answer, and the same in every run."""
        torch.manual_seed(self.settings.seed + zlib.crc32(salt.encode()) if salt else self.settings.seed)

    def text_of(self, tokens: list[int]) -> str:
        """Return generated ids as text, or as numbers where there is no tokenizer."""
        if self.tokenizer is None:
            return " ".join(map(str, tokens))
        return self.tokenizer.decode(tokens, skip_special_tokens=True).strip()

    def streamer(self) -> Any:
        """Return what prints an answer to standard output as it comes, on the first rank."""
        from transformers import TextStreamer

        if not self.is_first or self.tokenizer is None:
            return None
        return TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True)


def _ids_of(sample: Sample) -> dict[str, Tensor]:
    """Return the ids of a sample, by field."""
    ids = {"document_ids": sample.document_ids, "query_ids": sample.query_ids, "embedded_ids": sample.embedded_ids}
    return {name: tensor for name, tensor in ids.items() if tensor is not None}


def count_prefill(engine: Any, context: Context, num_query: int, *, num_logits: int = 1) -> dict[str, Any] | None:
    """Return the operations of a prefill and of the query asked after it, as `PrefillFlops.as_dict` gives them.

    None for a model whose linear layers are not those that its config's sizes make up (experts, an MLP without a gate,
    quantised weights).
    """
    model, plan = engine.module, context.plan
    sizes = ModelSizes.from_config(model.config)
    linears = (module for module in model.base_model.modules() if isinstance(module, torch.nn.Linear))
    if sizes is None or sum(linear.in_features * linear.out_features for linear in linears) != sizes.linear_weights:
        return None
    compressor = engine.attention.compressor
    return count_flops(sizes, plan, compressor=compressor, query_length=num_query, num_logits=num_logits).as_dict()


def plan_metrics(context: Context, group: SequenceGroup) -> dict[str, Any]:
    """Return the numbers of a prefill: of the slowest rank, and of each. All ranks call this together."""
    plan = context.plan
    num_tokens = plan.num_tokens
    prefill_s = gather_numbers(group, prefill_s=context.prefill_s)["prefill_s"]
    return {
        "document_tokens": num_tokens,
        "hosts": plan.hosts,
        "ranks": plan.world_size,
        "rounds": len(plan.rounds),
        "block_length": max(plan.block_length(host) for host in range(plan.hosts)),
        "anchor_length": plan.anchor_length,
        "passing_length": plan.passing_length,
        "kept_lengths": list(plan.kept_lengths),
        "exact": plan.exact,
        "prefill_s": max(prefill_s),
        "prefill_s_per_rank": prefill_s,
        "prefill_tokens_per_s": rate(num_tokens, max(prefill_s)),
    }


def usage_metrics(group: SequenceGroup, bytes_sent: int, peak: int) -> dict[str, Any]:
    """Return bytes sent and peak memory of each rank. All ranks call this together."""
    numbers = gather_numbers(group, bytes_sent=bytes_sent, peak=peak)
    return {
        "bytes_sent": numbers["bytes_sent"],
        "peak_memory_bytes": max(numbers["peak"]),
        "peak_memory_bytes_per_rank": numbers["peak"],
    }
