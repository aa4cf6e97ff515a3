"""Having kernels compiled before the first request, which would wait for them, and running answers with it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from apb_ds.engine.engine import APBEngine

DOCUMENT_TOKENS = (8192, 6000)
LONGEST_SHARE = 4  # of the model's positions, a document has at most one part in so many
QUERY_TOKENS = (21, 34, 17)
# About the first document and about the second. Compilers make other code for one of something than for several, and
# what they make for a second number of several serves all further ones.
ASKED_TOGETHER = ((1, 0), (2, 0), (3, 0), (3, 1), (1, 2), (2, 2))
NEW_TOKENS = 12  # packs are recorded a few steps after one has joined or left
ARGUMENTS: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None}


def warm_up(engine: APBEngine, max_bytes: int) -> None:
    """Answer a few made-up questions, alone and together, about two documents. All ranks do so together.

    Parameters
    ----------
    max_bytes : as of `APBEngine.batch`
    """
    generator = torch.Generator().manual_seed(0)
    vocab_size = engine.module.get_input_embeddings().num_embeddings
    positions = getattr(engine.module.config.get_text_config(), "max_position_embeddings", None)
    longest = DOCUMENT_TOKENS[0] if positions is None else positions // LONGEST_SHARE

    def random_ids(length: int) -> Tensor:
        return torch.randint(vocab_size, (1, length), generator=generator).to(engine.device)

    with engine.batch(max_bytes=max_bytes) as batch:
        contexts = [
            batch.prefill(random_ids(min(length, longest - index)), new_tokens=0)
            for index, length in enumerate(DOCUMENT_TOKENS)
        ]
        for numbers in ASKED_TOGETHER:
            asked = [
                (context.branch(), length)
                for context, number in zip(contexts, numbers, strict=True)
                for length in QUERY_TOKENS[:number]
            ]
            handles = [
                batch.submit(random_ids(length), context=branch, append=True, **ARGUMENTS) for branch, length in asked
            ]
            batch.run()
            for handle, (branch, _) in zip(handles, asked, strict=True):
                handle.result()  # raises what went wrong
                branch.free()
