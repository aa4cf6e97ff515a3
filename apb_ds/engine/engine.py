"""The engine: a ``deepspeed.InferenceEngine`` that prefills a document over many hosts and answers queries."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Self

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.inference.config import DeepSpeedInferenceConfig
from deepspeed.inference.engine import InferenceEngine
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from apb_ds.attention import APBAttention, Phase, check_available
from apb_ds.cache import ShardedCache
from apb_ds.compressors.base import needs_heads
from apb_ds.compressors.retaining_heads import RetainingHeads
from apb_ds.config import APBConfig, check_choice, config_and_heads
from apb_ds.engine.acceleration import Acceleration
from apb_ds.engine.batch import MAX_SEQUENCES, STEP_EVERY_S, Batch
from apb_ds.engine.calls import ended_after_errors, exclusive_call
from apb_ds.engine.choosing import prepare
from apb_ds.engine.context import DEVICE, HOST, PLACES, Branch, Context
from apb_ds.engine.cuda_graph import RecordedSteps
from apb_ds.engine.decoding import LockstepDecoder, RequestStats, forward_new
from apb_ds.engine.generation_settings import warn_of_overrides
from apb_ds.engine.loaded import read_manifest
from apb_ds.engine.packs import query_logits_together
from apb_ds.engine.prefill import run_rounds
from apb_ds.engine.prompts import answer_prompts
from apb_ds.engine.saved_facts import check_whole, model_facts
from apb_ds.engine.saved_files import beside
from apb_ds.engine.sequences import OnProgress
from apb_ds.engine.split import Split
from apb_ds.engine.together import answer_alone, generate_all
from apb_ds.engine.validation import GenerateCall, PrefillRequest, QueryRequest, Validator, check_ids
from apb_ds.hf.adapters import adapters_in_force
from apb_ds.hf.architecture import check_positions, check_supported
from apb_ds.hf.interface import apb_attention
from apb_ds.hf.pipelines import known_to_pipelines
from apb_ds.hf.probe import probe_model
from apb_ds.hf.rotary import warn_of_rough_frequencies
from apb_ds.hf.stages import Stage, probe_stage
from apb_ds.hf.tiled_mlps import check_tile
from apb_ds.hf.zero3 import is_partitioned, whole_weights
from apb_ds.loading.heads import HeadsSource, heads_for
from apb_ds.methods.state import PrefillState
from apb_ds.ops.kernels import KernelChoice
from apb_ds.ops.memory import explain_out_of_memory, levers
from apb_ds.parallel.consistency import describe_model, shared_validation
from apb_ds.parallel.groups import SequenceGroup
from apb_ds.plan import Plan, check_ranks
from apb_ds.suffixes import SuffixPool
from apb_ds.weights import ShardedWeights

logger = logging.getLogger(__name__)

# DeepSpeed counts prompt and new tokens against this; its default of 1024 does not apply here.
NO_TOKEN_LIMIT = 2**31


class APBEngine(InferenceEngine):
    """Serves one model over the ranks of a group. Made by `init_inference` or `attach`.

    All ranks of the group call the same methods with the same arguments, in the same order. Outside of these calls, and
    in other threads meanwhile, the model is as transformers made it: ``engine.module(input_ids)`` is plain, dense and
    local. Calls from several threads to engines of one model wait for each other.

    Attributes
    ----------
    apb_config : the options in force; change them with `configure`
    group : the ranks that share a request, of all stages
    stage : what this rank computes of the model in a pipeline, or None
    layers : how each layer attends
    pool : where the suffixes of batches and branches are stored
    weights : how they are sharded over the ranks, or None
    split : where `generate` cuts prompts
    stats : where the time of the last `prefill` or `generate` went
    """

    module: Any  # the PreTrainedModel

    def __init__(
        self,
        model: PreTrainedModel,
        config: APBConfig,
        group: SequenceGroup,
        retaining_heads: RetainingHeads | None = None,
        weights: ShardedWeights | None = None,
        stage: Stage | None = None,
    ) -> None:
        check_supported(model)
        warn_of_rough_frequencies(model)
        if group.is_first:
            warn_of_overrides(model)
            if is_partitioned(model):
                logger.info(
                    "DeepSpeed ZeRO-3 partitions the model's weights: each forward gathers them, also that of a new "
                    "token; oneDNN's and fused layers, tiled MLPs and recorded steps are off."
                )
        move_to_accelerator(model)
        # DeepSpeed's constructor converts, moves and empties the module that it is given, so it gets an empty one.
        dtype = model.dtype if model.dtype in get_accelerator().supported_dtypes() else torch.float32
        super().__init__(nn.Module(), DeepSpeedInferenceConfig(dtype=dtype, max_out_tokens=NO_TOKEN_LIMIT))
        self.module, self.config = model, model.config
        self.group = group
        self.weights = weights
        self.stage = stage
        self.layers = probe_model(model) if stage is None else probe_stage(model, stage)
        self.pool = SuffixPool(self.layers, self._sharing.rank, self._sharing.world_size, self.device)
        self.stats = RequestStats()
        self._split = Split()
        self._told_split: set[bool] = set()
        self._attached_to: tuple[nn.Module, dict[str, Any]] | None = None
        self._training = [module for module in model.modules() if module.training]
        self._heads: list[RetainingHeads] = []  # a list, which keeps them out of this module's tree
        self._heads_facts: dict[str, str] | None = None
        self._model_facts: tuple[list[tuple[int, int]], dict[str, str]] | None = None
        attention, heads = self._build_attention(config, retaining_heads)
        self._acceleration = Acceleration(
            self.module, config.settings, self._sharing, self._kernels_of(attention), self.layers
        )
        self._put_in_force(config, attention, heads)
        self.module.eval()

    def configure(
        self, config: APBConfig | Mapping[str, Any] | None = None, retaining_heads: HeadsSource | None = None
    ) -> None:
        """Change the settings; contexts made before stay usable.

        Parameters
        ----------
        config : as in `init_inference`
        retaining_heads : as in `init_inference`; by default those that were given before

        Raises
        ------
        ValueError, RuntimeError
            For settings that do not fit the group or the model, or name something that is not installed. Nothing is
            changed then.
        """
        config, retaining_heads = config_and_heads(config, retaining_heads)
        with exclusive_call(self.module):
            attention, heads = self._build_attention(config, retaining_heads)
            kernels = self._kernels_of(attention)
            if not self._acceleration.serves(config.settings, self._sharing, kernels):
                self._acceleration = Acceleration(self.module, config.settings, self._sharing, kernels, self.layers)
            self._put_in_force(config, attention, heads)

    def _build_attention(
        self, config: APBConfig, retaining_heads: HeadsSource | None
    ) -> tuple[APBAttention, RetainingHeads | None]:
        """Validate settings against model and group, and build what they need."""
        check_ranks(config, self._sharing.world_size)
        check_available(config)  # before files are looked for
        check_tile(self.module, config.settings.mlp_tile)
        if retaining_heads is None and needs_heads(config.compressor):
            retaining_heads = next(iter(self._heads), None)
        heads = heads_for(self.module, config, retaining_heads)
        if heads is not None and heads not in self._heads:
            heads = heads.placed(self.device, self.module.dtype)
        attention = APBAttention(config, self._sharing, heads)
        for heads_of_layer in {(layer.heads, layer.kv_heads) for layer in self.layers if layer.window is None}:
            attention.check_heads(*heads_of_layer)
        return attention, heads

    def _put_in_force(self, config: APBConfig, attention: APBAttention, heads: RetainingHeads | None) -> None:
        self.apb_config = config
        self.attention = attention
        if heads is not None and heads not in self._heads:
            self._heads = [heads]
            self._heads_facts = describe_model(heads) if self.group.world_size > 1 else None
        self._warned_exact = False
        # What all ranks must share besides a request's own facts; `configure` itself sends nothing.
        self._shared_facts = {
            "kernels": self.kernel_names,
            "retaining heads": self._heads_facts if heads is not None else None,
        }

    def __getattr__(self, name: str) -> Any:
        """Return the model's attribute where the engine has none, as DeepSpeed's training engine does."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            model = self._modules.get("module")
            if model is None or not hasattr(model, name):
                raise
            return getattr(model, name)

    @property
    def generation_config(self) -> GenerationConfig:
        """The model's; assigning one changes the model's."""
        config: GenerationConfig = self.module.generation_config
        return config

    @generation_config.setter
    def generation_config(self, config: GenerationConfig) -> None:
        self.module.generation_config = config

    def can_generate(self) -> bool:
        """Return True; transformers' pipelines ask that before they look at the model's class."""
        known_to_pipelines(type(self).__name__)
        return True

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    @property
    def kernel_names(self) -> dict[str, str]:
        """Names of the kernels in use, for ``prefill``, ``decode`` and, where steps are recorded, ``recorded``.

        Layers with windows or soft caps have theirs under such names as ``prefill (window)``.
        """
        names: dict[str, str] = {}
        for kind, kernels in self._kernels_of(self.attention).items():
            of_kind = kernels.names
            if self._recorded is not None and kernels.recorded is not None:
                of_kind["recorded"] = kernels.recorded.name
            names |= {f"{phase} ({kind})" if kind else phase: name for phase, name in of_kind.items()}
        return names

    @property
    def split(self) -> Split:
        return self._split

    @split.setter
    def split(self, split: Split | Mapping[str, Any] | None) -> None:
        self._split = Split.of(split)

    @property
    def _sharing(self) -> SequenceGroup:
        """The ranks that share a document: all of them, or those of this stage."""
        return self.group if self.stage is None else self.stage.pipeline.ranks

    @property
    def _validator(self) -> Validator:
        return Validator(self.module, self.apb_config, self.attention, self.group)

    @property
    def _recorded(self) -> RecordedSteps | None:
        return self._acceleration.recorded

    def _kernels_of(self, attention: APBAttention) -> dict[str, KernelChoice]:
        """Return the kernels by the kind of layer that they serve, empty for one without window and soft cap."""
        found = {}
        for layer_idx, layer in enumerate(self.layers):
            width = max(layer.head_dim, layer.value_dim)
            needs = {"window": layer.window is not None, "softcap": layer.softcap is not None}
            kind = " and ".join(name for name, needed in needs.items() if needed)
            try:
                found[kind] = attention.kernels_for(self.device, self.module.dtype, width, **needs)
            except ValueError as error:
                raise ValueError(f"layer {layer_idx} of {type(self.module).__name__}: {error}") from error
        return found

    def prefill(
        self,
        document_ids: Tensor,
        query_ids: Tensor | None = None,
        *,
        max_positions: int | None = None,
        progress: OnProgress | None = None,
    ) -> Context:
        """Put a document into the sharded cache.

        Parameters
        ----------
        document_ids : (1, n), int64, the same on every rank
        query_ids : (1, q), int64, or None
            Goes into the anchor unless the settings exclude it. Any other query can be asked later.
        max_positions : int
            Positions (document, queries, answers) that the context must serve. Matters for models whose rotary
            frequencies depend on it (dynamic, longrope). Default n + q.
        progress : callable
            Called as ``progress(done, total)`` after each layer of each round.

        Returns
        -------
        Context

        Raises
        ------
        ValueError
            For bad input, on every rank before anything is sent.
        torch.OutOfMemoryError
            On the rank that runs out of memory, with advice.
        """
        with exclusive_call(self.module):
            with shared_validation(self.group, "prefill", self.device) as comparison:
                request = self._validator.prefill(document_ids, query_ids, max_positions)
                comparison.facts = request.facts | self._shared_facts
            return self._run_prefill(request, comparison.digest, progress)

    def _run_prefill(
        self, request: PrefillRequest, key: str, progress: OnProgress | None, new_tokens: int | None = None
    ) -> Context:
        plan, num_tokens = request.plan, request.document_ids.shape[1]
        if new_tokens is None:
            new_tokens = request.max_positions - num_tokens
        self._warn_if_exact(plan)
        cache = ShardedCache(
            self.layers,
            self._sharing.rank,
            self._sharing.world_size,
            plan.shard_length(self._sharing.rank),
            new_tokens=new_tokens,
            query_tokens=0 if request.query_ids is None else request.query_ids.shape[1],
        )
        if self._recorded is not None:
            self._recorded.lend_buffers(cache)
        weights = self.weights
        gatherer = None if weights is None else weights.gatherer
        state = PrefillState(plan, cache, self._sharing.rank, progress=progress, weights=gatherer)
        sent_before, began = self.group.bytes_sent, self._now()
        longest = max(plan.num_forward_tokens(rank, 0) for rank in range(plan.world_size))
        with (
            explain_out_of_memory(
                f"prefilling {num_tokens} tokens, {longest} of them in a round",
                levers(plan, self.module.dtype, is_prefill=True),
            ),
            self._acceleration.in_prefill(longest),
            nullcontext() if weights is None else weights.in_prefill(state.layers, len(plan.rounds)),
            apb_attention(self.module, request.attention, cache, Phase.PREFILL, request.max_positions, state),
        ):
            run_rounds(self.module, request.attention, state, request.document_ids, request.query_ids)
        self.group.progress.leave_model()
        if self.stage is not None:
            self.group.barrier()  # the prefill ends with the last stage
        cache.set_length(num_tokens)
        prefill_s = self._now() - began
        self.stats = RequestStats(prefill_s=prefill_s)
        return Context(
            plan=plan,
            cache=cache,
            token_ids=request.document_ids,
            max_positions=request.max_positions,
            prefill_s=prefill_s,
            bytes_sent=self.group.bytes_sent - sent_before,
            engine=self,
            attention=request.attention,
            key=key,
            adapters=adapters_in_force(self.module),
        )

    def load_context(
        self,
        path: str | os.PathLike[str],
        *,
        place: str = DEVICE,
        new_tokens: int | None = None,
        while_waiting: Callable[[], object] | None = None,
    ) -> Context:
        """Load what `Context.save` wrote, on any number of ranks, without a prefill.

        The tokens are dealt evenly over the ranks, unless there are as many as saved it: then each gets what that rank
        had. Every rank reads only what it needs, and checks it.

        Parameters
        ----------
        path : of the directory, which all ranks see
        place : ``device``, or ``host`` to load into host memory, for `Context.to_device` later
        new_tokens : as of `Batch.prefill`
        while_waiting : as of `Context.save`, while files are read

        Raises
        ------
        ValueError
            On every rank: if there is no saved context, a file was changed or truncated, or the model, its weights or
            the settings differ from those that it was prefilled with.
        torch.OutOfMemoryError, RuntimeError
            The first on the rank that runs out of memory, the other elsewhere.
        """
        with exclusive_call(self.module):
            facts = self.model_facts()
            with shared_validation(self.group, "load_context", self.device) as comparison:
                check_whole(self.stage)
                check_choice("place", place, PLACES)
                saved = read_manifest(path)
                saved.check_model(facts, self.layers)
                plan = self._validator.plan(saved.document_tokens, saved.anchor_query_length)
                saved.check_settings(self.attention, plan)
                check_positions(self.module, saved.max_positions)
                token_ids = check_ids(self.module, "token_ids", saved.token_ids)
                comparison.facts = {"path": str(path), "place": place, "saved context": saved.checksum}
            on_host = place == HOST and self.device.type != "cpu"
            first, stop = saved.shard_span(self.group.rank, self.group.world_size)
            cache = ShardedCache(
                self.layers,
                self.group.rank,
                self.group.world_size,
                stop - first,
                new_tokens=max(0, saved.max_positions - saved.cached_tokens) if new_tokens is None else new_tokens,
            )
            if self._recorded is not None and not on_host:
                self._recorded.lend_buffers(cache)
            read = partial(saved.read_into, cache, (first, stop), self.device, on_host=on_host)
            beside(self.group, read, while_waiting)
            return Context(
                plan=plan,
                cache=cache,
                token_ids=token_ids,
                max_positions=saved.max_positions,
                prefill_s=0.0,
                bytes_sent=0,
                engine=self,
                attention=self.attention,
                key=comparison.digest,
                adapters=adapters_in_force(self.module),
                place=place,
            )

    def model_facts(self) -> dict[str, str]:
        """Return what a saved context's model must share with this one, read again when weights have changed.

        All ranks call this together: weights that ZeRO-3 partitions are gathered, one after the other.
        """
        if self.weights is not None:
            return self.weights.facts
        if is_partitioned(self.module):
            return model_facts(self.module, whole_weights(self.module))
        weights = [
            (parameter.data_ptr(), -1 if parameter.is_inference() else parameter._version)
            for parameter in self.module.parameters()
        ]
        if self._model_facts is None or self._model_facts[0] != weights:
            self._model_facts = weights, model_facts(self.module)
        adapters = adapters_in_force(self.module)  # switching one changes no weights
        return self._model_facts[1] | ({"adapters": ", ".join(adapters)} if adapters else {})

    def generate(
        self,
        document_ids: Tensor | Sequence[Tensor] | None = None,
        query_ids: Tensor | Sequence[Tensor] | None = None,
        max_new_tokens: int | None = None,
        *,
        context: Context | Branch | Sequence[Context | Branch] | None = None,
        append: bool = False,
        input_ids: Tensor | None = None,
        inputs: Tensor | None = None,
        query_length: int | None = None,
        seed: int | None = None,
        settings: Sequence[Mapping[str, Any]] | None = None,
        progress: OnProgress | None = None,
        **generate_arguments: Any,
    ) -> Any:
        """Answer a query about a document, with transformers' own `generate` arguments; or many at once.

        Three forms: ``generate(document_ids, query_ids)``; ``generate(query_ids=..., context=...)`` with a document
        prefilled before; ``generate(input_ids)`` with whole prompts, as transformers' own is called. Of these, the last
        `query_length` tokens are the query, or else what the engine's `split` says. So ids that come alone, without a
        query and a context, are prompts, also by position or as ``inputs=``.

        With a list of queries, in the first two forms, their answers are decoded together: queries about one context,
        or as many contexts or documents as queries. See `batch` for queries that come and go.

        Parameters
        ----------
        document_ids, query_ids : (1, tokens), int64, the same on every rank
        input_ids, inputs : (rows, tokens), int64, the same on every rank
            Rows may be padded on the left, where ``attention_mask`` has zeros. They are answered together.
        context : Context or Branch
        max_new_tokens : int
            As in transformers; also from ``generation_config`` or ``max_length``.
        append : bool
            Keep query and answer in `context`, so that the next query follows them. With lists, in branches only.
        query_length : int, tokens
        seed : int, 0 or more
            Sample with a random generator of this seed, so that the answer does not depend on torch's global one,
            which is used by default. Greedy answers need none.
        settings : sequence of mappings
            With a list of queries, for each of them what differs from the other arguments: ``{"seed": 7}``.
        progress : see `prefill`
        **generate_arguments
            Sampling, processors, ``stop_strings`` with ``tokenizer``, ``streamer`` and so on. Logits processors,
            stopping criteria and the streamer run on the group's first rank.

        Returns
        -------
        (1, new_tokens), int64, the same on every rank. Whole prompts come first, as in transformers, and rows that
        ended early are padded on the right: (rows, tokens + new_tokens). With a list of queries, a list of
        such answers in their order; in place of one that failed, the exception, for bad input, too. The others do not
        depend on it.

        Raises
        ------
        ValueError
            For documents or queries of several rows, prompts padded on the right, beams, several return sequences,
            assisted decoding, ``use_cache=False`` and bad input, on every rank before anything is sent.
        """
        if isinstance(query_ids, (list, tuple)):
            given = {"max_new_tokens": max_new_tokens, "append": append, "seed": seed, "progress": progress}
            refused = {"input_ids": input_ids, "inputs": inputs, "query_length": query_length}
            return generate_all(
                self, query_ids, context, document_ids, settings, refused, {**given, **generate_arguments}
            )
        if settings is not None:
            raise ValueError("settings is for each query of a list; pass a single query's arguments by name.")
        ids: dict[str, Any] = {"input_ids": input_ids, "inputs": inputs}
        if any(given is not None for given in (*ids.values(), query_length)) or (query_ids is None and context is None):
            ids |= {"document_ids": document_ids, "query_ids": query_ids, "context": context}
            given = {"max_new_tokens": max_new_tokens, "append": append, "seed": seed, "progress": progress}
            return answer_prompts(self, ids, query_length, {**given, **generate_arguments})
        call = GenerateCall(document_ids, query_ids, max_new_tokens, context, append, seed, generate_arguments)
        streamer = generate_arguments.get("streamer") if self.group.is_first else None
        with exclusive_call(self.module), ended_after_errors(streamer):
            with shared_validation(self.group, "generate", self.device) as comparison:
                request = self._validator.generate(call)
                comparison.facts = request.facts | self._shared_facts
            prefill_s = 0.0
            source = request.source
            if isinstance(source, PrefillRequest):
                source = self._run_prefill(source, comparison.digest, progress)
                prefill_s = source.prefill_s
            tokens = answer_alone(self, request) if isinstance(source, Branch) else self._decode(request, source)
            self.stats.prefill_s = prefill_s
            return tokens

    def query_logits(
        self,
        query_ids: Tensor | Sequence[Tensor],
        *,
        context: Context | Branch | Sequence[Context | Branch],
    ) -> Any:
        """Return the logits of every query token; the context stays as it was. Or those of many queries at once.

        Parameters
        ----------
        query_ids : (1, q), int64, the same on every rank; or a list of queries
        context : Context or Branch
            With a list of queries also a list of as many.

        Returns
        -------
        (1, q, vocab), float32, the same on every rank; with a list of queries, a list of such logits

        Raises
        ------
        ValueError, torch.OutOfMemoryError
            As `prefill`.
        """
        is_list = isinstance(query_ids, (list, tuple))
        queries: Any = query_ids if is_list else [query_ids]
        contexts: Any = context if isinstance(context, (list, tuple)) else [context] * len(queries)
        with exclusive_call(self.module):
            with shared_validation(self.group, "query_logits", self.device) as comparison:
                requests = self._validator.all_logits(queries, contexts)
                facts = [request.facts for request in requests]
                of_each = {
                    f"{name} of query {index}": fact for index, one in enumerate(facts) for name, fact in one.items()
                }
                comparison.facts = (of_each if is_list else facts[0]) | self._shared_facts
            if is_list or isinstance(context, Branch):
                logits = query_logits_together(self, requests)
            else:
                logits = [self._query_logits(requests[0].ids, requests[0].source)]
            self.group.progress.leave_model()
            shared = [self.group.broadcast(of_query) for of_query in logits]
            return shared if is_list else shared[0]

    def _query_logits(self, query_ids: Tensor, context: Any) -> Tensor:
        num_query = query_ids.shape[1]
        cached = context.num_cached
        context.release_prefix()
        context.cache.forget_unreachable()
        ids = torch.cat([context.token_ids, query_ids], dim=-1)
        try:
            with (
                self._explaining_memory(context, num_query),
                self._acceleration.in_decoding(),
                apb_attention(self.module, self.attention, context.cache, Phase.QUERY, context.max_positions),
            ):
                return forward_new(self.module, ids, cached, context.cache, num_query).contiguous()
        finally:
            context.cache.crop_to(cached)

    def destroy(self) -> None:
        """Free what the engine holds besides the model: recorded steps with a cache, unused slots, and retaining heads.

        DeepSpeed's method frees the workspace of kernels that are never loaded here, and fails without one.
        """
        self._acceleration.recorded = self._acceleration.packed = None
        self.pool.trim()
        self._heads.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Free what `destroy` frees; the engine can be used again."""
        self.destroy()

    def restore_training(self) -> None:
        """Put modules back into training mode that were in it before; calls of the engine run in eval mode anyway."""
        for module in self._training:
            module.training = True
        self._training = []

    def detach(self) -> nn.Module:
        """Undo `attach` and return the engine it was called with, its `generate` restored; else return the model."""
        self.restore_training()
        if self._attached_to is None:
            return self.module
        engine, before = self._attached_to
        engine.__dict__.pop("generate", None)
        engine.__dict__.update(before)
        self._attached_to = None
        return engine

    def _decode(self, request: QueryRequest, context: Context) -> Tensor:
        before = context.num_cached
        context.release_prefix()
        context.cache.forget_unreachable()
        prompt = torch.cat([context.token_ids, request.ids], dim=-1)
        chooser = prepare(self.module, prompt, request.num_new, request.arguments, seed=request.seed)
        kept = False
        try:
            with (
                self._explaining_memory(context, request.ids.shape[1]),
                self._acceleration.in_decoding(),
                apb_attention(self.module, self.attention, context.cache, Phase.QUERY, context.max_positions) as call,
            ):
                decoder = LockstepDecoder(self.group, call, chooser, self._synchronize, self._recorded)
                everything = decoder.run(self.module, prompt, context.cache)
            kept = request.append
        finally:
            if not kept:
                context.cache.crop_to(before)
        self.group.progress.leave_model()
        self.stats = decoder.stats
        if request.append:
            context.token_ids = everything
        return everything[:, prompt.shape[1] :].clone()  # the caller may change it; the context keeps the original

    def batch(
        self,
        max_sequences: int = MAX_SEQUENCES,
        *,
        max_bytes: int | None = None,
        step_every_s: float = STEP_EVERY_S,
        on_pause: Callable[[], None] | None = None,
    ) -> Batch:
        """Return a batch: sequences that decode together, and join and leave between steps.

        Parameters
        ----------
        max_sequences : that decode at a time; further ones wait
        max_bytes : per rank, of what sequences store besides their documents, and of documents that the batch prefills.
            By default what is free now, on the rank that has least.
        step_every_s : seconds between two steps while the batch prefills a document, about
        on_pause : called on every rank before each of these steps. What it submits about contexts joins there; raising
            an exception, on all ranks alike, abandons the prefill.
        """
        return Batch(self, max_sequences, max_bytes, step_every_s, on_pause)

    def _explaining_memory(self, context: Context, num_query: int) -> AbstractContextManager[None]:
        """Say what helps if memory runs out while a query is answered."""
        doing = f"answering {num_query} query tokens after {context.num_tokens}"
        return explain_out_of_memory(doing, levers(context.plan, self.module.dtype, is_prefill=False))

    def _warn_if_exact(self, plan: Plan) -> None:
        if not plan.exact or self.apb_config.is_exact_method or self._warned_exact or not self.group.is_first:
            return
        longest = max(plan.block_length(host) for host in range(plan.hosts))
        why = "hosts=1" if plan.hosts == 1 else f"the anchor would be longer than a block of {longest} tokens"
        logger.warning("running exact attention over a document of %d tokens: %s.", plan.num_tokens, why)
        self._warned_exact = True

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            get_accelerator().synchronize()

    def _weights_in_place(self) -> AbstractContextManager[None]:
        """Have sharded weights used in place, also inside a prefill."""
        return nullcontext() if self.weights is None else self.weights.in_place()

    def _now(self) -> float:
        self._synchronize()
        return time.perf_counter()


def move_to_accelerator(model: PreTrainedModel) -> None:
    """Move a model that is whole on another device to this rank's, unless a device map or a quantiser placed it."""
    target = torch.device(get_accelerator().current_device_name())
    devices = {parameter.device for parameter in model.parameters()}
    is_placed = getattr(model, "hf_device_map", None) or getattr(model, "hf_quantizer", None)
    if not is_placed and len(devices) == 1 and devices != {target}:
        nn.Module.to(model, target)
