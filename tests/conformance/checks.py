"""Whether the engine gives what a plain transformers model does, on one rank: the verdict on a model."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

import apb_ds
from tests.conformance.builder import ORDINARY_IDS, SPECIAL_IDS, build

# Several windows long, and of no length that divides evenly.
DOCUMENT_LENGTH, QUERY_LENGTH, NEW_TOKENS = 98, 7, 8
# Float32, sums in another order, over the layers of a tiny model; a wrong mask is off by a hundred times that.
TOLERANCE = 1e-4

EXACT: dict[str, Any] = {"hosts": 4, "anchor_length": 0, "compression_ratio": 1}
CONFIGS: dict[str, dict[str, Any]] = {
    "one host a forward": {**EXACT, "hosts_per_round": 1},
    "several hosts a forward": {**EXACT, "hosts_per_round": 3},
    "dense": {"method": "dense"},
    "ring": {"method": "ring"},
}
APPROXIMATE: dict[str, Any] = {"hosts": 4, "anchor_length": 16, "compression_ratio": 2, "compressor": "window"}


@dataclass(frozen=True)
class Verdict:
    """What became of a model.

    Attributes
    ----------
    kind : ``exact``, ``refused`` when the engine is made, ``wrong``, or ``not built`` by transformers
    reason : why it was refused or not built, or what is wrong
    """

    kind: str
    reason: str = ""


def request_ids() -> tuple[Tensor, Tensor]:
    """Return a document and a query, (1, tokens) each, of distinct ordinary ids."""
    order = torch.randperm(len(ORDINARY_IDS), generator=torch.Generator().manual_seed(1))
    ids = (order[: DOCUMENT_LENGTH + QUERY_LENGTH] + ORDINARY_IDS.start).unsqueeze(0)
    return ids[:, :DOCUMENT_LENGTH], ids[:, DOCUMENT_LENGTH:]


@functools.cache
def verdict_on(name: str, is_wrapper: bool = False) -> Verdict:
    """Build a tiny model of a type or variant, see `build`, and judge it."""
    try:
        model = build(name, is_wrapper=is_wrapper)
    except Exception as error:
        return Verdict("not built", f"{type(error).__name__}: {error}")
    return judge(model)


@torch.no_grad()
def judge(model: PreTrainedModel) -> Verdict:
    """Run a model plainly and through the engine with exact settings, and compare."""
    try:
        engine = apb_ds.init_inference(model, apb_ds.APBConfig(**CONFIGS["one host a forward"]))
    except ValueError as error:
        return Verdict("refused", str(error))
    except Exception as error:
        return Verdict("wrong", f"init_inference: {type(error).__name__}: {error}")
    try:
        faults = list(_faults(model, engine))
    except Exception as error:
        return Verdict("wrong", f"{type(error).__name__}: {error}")
    return Verdict("wrong", "; ".join(faults)) if faults else Verdict("exact")


def _faults(model: PreTrainedModel, engine: Any) -> Iterator[str]:
    document, query = request_ids()
    ids = torch.cat([document, query], dim=1)
    before = model(ids).logits
    expected = before[:, -QUERY_LENGTH:].float()
    if not _sees_the_document(model, ids, expected):
        yield "the plain model's logits hardly depend on the document, so they show nothing"
    generate: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False}
    for name in SPECIAL_IDS:
        setattr(model.generation_config, name, None)
    tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **generate)[:, ids.shape[1] :]
    for name, settings in CONFIGS.items():
        engine.configure(settings)
        context = engine.prefill(document)
        error = _relative_error(engine.query_logits(query, context=context), expected)
        if not error < TOLERANCE:
            yield f"{name}: logits are off by {error:.1e} of their scale"
        given = engine.generate(query_ids=query, context=context, **generate)
        if not torch.equal(given, tokens):
            yield f"{name}: generate gives {given.tolist()}, not {tokens.tolist()}"
    # The last context's question among others that are shorter, and in a batch with a short document of its own.
    others = [query[:, :3], query, query[:, :5]]
    together = engine.generate(query_ids=others, context=context, **generate)
    if not isinstance(together[1], Tensor) or not torch.equal(together[1], tokens):
        yield f"with other queries, generate gives {together[1]}, not {tokens.tolist()}"
    (short,) = engine.generate(document_ids=[document], query_ids=[query], **generate)
    if not isinstance(short, Tensor) or not torch.equal(short, tokens):
        yield f"fed with its document, generate gives {short}, not {tokens.tolist()}"
    error = _relative_error(engine.query_logits(others, context=context)[1], expected)
    if not error < TOLERANCE:
        yield f"with other queries, logits are off by {error:.1e} of their scale"
    engine.configure(APPROXIMATE)
    logits = engine.query_logits(query, context=engine.prefill(document, query))
    if not logits.isfinite().all():
        yield "logits are not finite with an anchor and the window compressor"
    engine.detach()
    if not torch.equal(model(ids).logits, before):
        yield "the plain model's logits changed"


def _sees_the_document(model: PreTrainedModel, ids: Tensor, expected: Tensor) -> bool:
    other = ids.clone()
    other[:, :DOCUMENT_LENGTH] = other[:, :DOCUMENT_LENGTH].flip(1)
    return _relative_error(model(other).logits[:, -QUERY_LENGTH:].float(), expected) > 100 * TOLERANCE


def _relative_error(logits: Tensor, expected: Tensor) -> float:
    """Return the largest difference in units of the largest logit; nan if a logit is not finite."""
    return float((logits.float() - expected).abs().max() / expected.abs().max())
