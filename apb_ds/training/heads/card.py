"""The model card of retaining heads: how they were trained, and how good they are on held-out conversations."""

from __future__ import annotations

from typing import Any

from apb_ds.training.card import training_facts

CARD = """\
---
library_name: apb_ds
base_model: {base}
tags: [long-context, kv-cache, retaining-heads]
---

# Retaining heads for {base}

Per layer, `fc2(act(fc1([q; k; v])))` with a hidden size of {hidden} predicts which tokens of a block later tokens will
attend to (Locret, arXiv 2410.01805). {parameters} parameters in `{file}`. Use them with
`method.compressor=retaining_heads method.retaining_heads=<this directory>`.

## Training

- The model is frozen; labels come from its own attention: {value}, {over_observers} over observers ({observers}, at
  most {num_observers} of a conversation), {over_heads} over a group's heads{options}.
- {steps} steps of up to {tokens} tokens on each of {ranks} rank(s), conversations of {shortest} to {longest} tokens,
  {dtype}; SmoothL1 + {smoothing} x smoothing.
- Generated documents of `task=synthetic`'s split `train`, with real text as filler in a share of {text_share}; real
  text to quote from in {quote_share} of the conversations, and to continue in {continue_share}. It comes from
  {num_texts} files: {texts}{data}.
- AdamW, learning rate {rate}, betas 0.9 and 0.95, weight decay {decay}, warm-up of {warmup} steps, then linear to zero;
  gradients clipped to {clip} by value; seed {seed}.
- {done} steps took {seconds} s on {hardware}.
- torch {torch}, transformers {transformers}, deepspeed {deepspeed}; commit {commit}.

## On {held_out} held-out conversations

{hosts} blocks, each keeping one token in {ratio:g}.

| step | loss | overlap of the top tenth | attention mass kept | at random | at best |
| --- | --- | --- | --- | --- | --- |
{curve}

`training.json` next to this file has all settings. To train them again, run the same command at that commit:
`deepspeed launch/train_heads.py {overrides}`.
"""
COLUMNS = ("loss", "overlap", "mass", "mass_random", "mass_best")
VALUES = {"logit": "scaled logits", "weight": "weights", "log_weight": "log weights"}
OBSERVERS = {"answer": "the answer's tokens", "later": "any later tokens"}


def heads_card(record: dict[str, Any], file: str) -> str:
    """Return the card of trained heads, in Markdown."""
    train = record["settings"]["train"]
    options = [
        "times the norm of the token's value" if train["value_norms"] else "",
        "standardised per KV head" if train["standardise"] else "",
        f"each of {train['observed_hosts']} blocks observes those before it" if train["observed_hosts"] else "",
    ]
    same = ("over_observers", "over_heads", "num_observers", "smoothing", "text_share", "quote_share", "continue_share")
    return CARD.format(
        **training_facts(record),
        **{name: train[name] for name in (*same, "held_out")},
        hidden=train["hidden_size"],
        parameters=f"{record['parameters']:,}",
        file=file,
        value=VALUES[train["label"]],
        observers=OBSERVERS[train["observers"]],
        options="".join(f", {option}" for option in options if option),
        num_texts=record["texts"]["number"],
        texts=", ".join(record["texts"]["places"]),
        data=f"; {train['data']} in a share of {train['data_share']}" if train["data"] else "",
        decay=train["weight_decay"],
        hosts=train["measured_hosts"],
        ratio=train["measured_ratio"],
        curve="\n".join(_row(line) for line in record["curve"]),
        overrides=record["overrides"],
    )


def _row(line: dict[str, Any]) -> str:
    return f"| {line['step']} | {' | '.join(f'{line[name]:.4f}' for name in COLUMNS)} |"
