"""The model card of trained weights, from the record of their training."""

from __future__ import annotations

from typing import Any

from apb_ds.training.output import CHANGEABLE

CARD = """\
---
library_name: {library}
base_model: {base}
tags: {tags}
---

# {title}

{about}

## Training

{steps} steps of {tokens} tokens on each of {ranks} rank(s) in {dtype}, seed {seed}; {done} steps took {seconds} s on
{hardware}. torch {torch}, transformers {transformers}, deepspeed {deepspeed}; commit {commit}.

| setting | value |
| --- | --- |
{settings}

## Result

{result}

`training.json` next to this file is the whole record. To train again, run the same command at that commit:
`deepspeed {command}`.
"""
UNLISTED = (*CHANGEABLE, "steps", "tokens_per_step", "mixture")


def make_card(
    record: dict[str, Any], library: str, tags: str, *, title: str, about: str, result: str, command: str
) -> str:
    """Return a model card in Markdown.

    Parameters
    ----------
    library, tags : the card's metadata
    title, about : what the weights are, and how to use them
    result : how good they are
    command : the launch script and its arguments
    """
    train, hardware = record["settings"]["train"], record["hardware"]
    return CARD.format(
        library=library,
        base=record["settings"]["model"]["path"],
        tags=tags,
        title=title,
        about=about,
        steps=record["steps"],
        tokens=train["tokens_per_step"],
        ranks=record["ranks"],
        dtype=record["model"]["dtype"],
        seed=record["settings"]["seed"],
        done=record["steps"] - record["resumed_after"],
        seconds=record["seconds"],
        hardware=hardware.get("gpu") or hardware["cpu"],
        **{name: record["versions"][name] for name in ("torch", "transformers", "deepspeed")},
        commit=record["git"]["commit"],
        settings="\n".join(f"| {name} | {value} |" for name, value in train.items() if name not in UNLISTED),
        result=result,
        command=command,
    )
