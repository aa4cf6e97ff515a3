"""Model cards: how weights were trained, from the record of their training."""

from __future__ import annotations

from typing import Any

CARD = """\
---
library_name: peft
base_model: {base}
tags: [evaluation, long-context, lora]
---

# A model for evaluating long-context attention

A LoRA with which `{base}` finds, tracks and counts things in generated documents. The plain model fails most such tasks
even with exact attention, so it cannot show what an approximation loses. This one is not a chat model, knows nothing
that the base model does not know, and answers other questions worse.

Load it merged into the base model's weights: `python launch/eval.py model.adapter=<this directory>`.

## Training

- Documents and questions: the generator of `task=synthetic`, split `train`, which shares no word, sentence or choice
  with the split used for evaluation. Dense attention; the loss covers the answers only.
- {steps} steps of {tokens} tokens on each of {ranks} rank(s), conversations of {shortest} to {longest} tokens, {dtype};
  in a share of {asked_first:g} of them the first question also precedes the document.
- LoRA of rank {rank} (alpha {alpha}) on all linear layers; AdamW, learning rate {rate}, warm-up of {warmup} steps,
  then a cosine to zero; gradients clipped to a norm of {clip}; seed {seed}.
- Last loss: {loss}. {done} steps took {seconds} s on {hardware}.
- torch {torch}, transformers {transformers}, deepspeed {deepspeed}; commit {commit}.

`training.json` next to this file has all settings, including the mixture of documents. To train it again, run the same
command at that commit: `deepspeed launch/train_instrument.py +exp=smollm2_ruler`.
"""


def instrument_card(record: dict[str, Any]) -> str:
    """Return the card of a LoRA, in Markdown."""
    train = record["settings"]["train"]
    return CARD.format(
        **training_facts(record),
        rank=train["lora_rank"],
        alpha=train["lora_alpha"],
        asked_first=train["asked_first"],
        loss=record["last_loss"],
    )


def training_facts(record: dict[str, Any]) -> dict[str, Any]:
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
