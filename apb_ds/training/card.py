"""The card of a trained adapter: what it is for, what it is not, and how it came about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

CARD = """\
---
library_name: peft
base_model: {base}
tags: [evaluation, long-context, lora]
---

# An instrument for evaluating long-context attention

A LoRA for `{base}` that finds, tracks and counts things in made-up documents. It exists so that an approximation of
attention has something to lose: the plain model fails most of such tasks even with exact attention. It is no chat
model, knows nothing that the base model does not know, and answers other questions worse.

Load it merged into the base model's weights: `python launch/eval.py model.adapter=<this directory>`.

## How it was trained

- Documents and questions: the generator of `task=synthetic`, split `train`, which shares no word, sentence or choice
  with the split that evaluates. Dense attention; the loss is that of the answers alone.
- {steps} steps of {tokens} tokens on each of {ranks} rank(s), conversations of {shortest} to {longest} tokens, {dtype};
  in a share of {asked_first:g} of them the first question also stands ahead of the document.
- LoRA of rank {rank} (alpha {alpha}) on all linear layers; AdamW, learning rate {rate}, warm-up of {warmup} steps,
  then a cosine to zero; gradients clipped to a norm of {clip}; seed {seed}.
- Last loss: {loss}. It took {seconds} s for {done} steps on {hardware}.
- torch {torch}, transformers {transformers}, deepspeed {deepspeed}; commit {commit}.

`training.json` beside this file has all settings, the mixture of documents included. The same command, at that
commit, makes it again: `deepspeed launch/train_instrument.py +exp=smollm2_ruler`.
"""


def facts_of(record: dict[str, Any]) -> dict[str, Any]:
    """Return what the card of any training says, from its record."""
    train, versions, hardware = record["settings"]["train"], record["versions"], record["hardware"]
    return {
        "base": record["settings"]["model"]["path"],
        "steps": record["steps"],
        "tokens": train["tokens_per_step"],
        "ranks": record["ranks"],
        "shortest": train["min_length"],
        "longest": train["max_length"],
        "dtype": record["model"]["dtype"],
        "rate": train["learning_rate"],
        "warmup": train["warmup_steps"],
        "clip": train["clip"],
        "seed": record["settings"]["seed"],
        "seconds": record["seconds"],
        "done": record["steps"] - record["resumed_after"],
        "hardware": hardware.get("gpu") or hardware["cpu"],
        **{name: versions[name] for name in ("torch", "transformers", "deepspeed")},
        "commit": record["git"]["commit"],
    }


def write_card(directory: Path, record: dict[str, Any]) -> None:
    """Write ``README.md`` into an adapter's directory, from the record of its training."""
    train = record["settings"]["train"]
    own = {"rank": train["lora_rank"], "alpha": train["lora_alpha"], "loss": record["last_loss"]}
    own["asked_first"] = train.get("asked_first", 0.0)
    (directory / "README.md").write_text(CARD.format(**facts_of(record), **own), encoding="utf-8")
