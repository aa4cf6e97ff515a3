"""The card of trained heads: what they are for, how they came about, how good they are on what they have not seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from apb_ds.training.card import facts_of

CARD = """\
---
library_name: apb_ds
base_model: {base}
tags: [long-context, kv-cache, retaining-heads]
---

# Retaining heads for {base}

Per layer, `fc2(act(fc1([q; k; v])))` with a hidden size of {hidden} says which tokens of a block later ones will attend
to (Locret, arXiv 2410.01805). {parameters} parameters in `{file}`. For
`method.compressor=retaining_heads method.retaining_heads=<this directory>`.

## How they were trained

- The model is frozen; labels are made of its own attention: {value}, {over_observers} over observers ({observers},
  at most {num_observers} of a conversation), {over_heads} over a group's heads{standardised}{blocks}.
- {steps} steps of up to {tokens} tokens on each of {ranks} rank(s), conversations of {shortest} to {longest} tokens,
  {dtype}; SmoothL1 + {smoothing} x smoothing.
- Made-up documents of `task=synthetic`'s split `train`; real text, at {text_share} of them as filler, at {quote_share}
  of conversations to quote from and at {continue_share} to continue, from {num_texts} files: {texts}{data}.
- AdamW, learning rate {rate}, betas 0.9 and 0.95, weight decay {decay}, warm-up of {warmup} steps, then linear to zero;
  gradients clipped to {clip} by value; seed {seed}.
- It took {seconds} s for {done} steps on {hardware}.
- torch {torch}, transformers {transformers}, deepspeed {deepspeed}; commit {commit}.

## On {held_out} conversations that they were not trained on

{hosts} blocks, one token in {ratio:g} kept of each.

| step | loss | overlap of the top tenth | attention mass kept | at random | at best |
| --- | --- | --- | --- | --- | --- |
{curve}

`training.json` beside this file has all settings. The same command, at that commit, makes them again:
`deepspeed launch/train_heads.py {overrides}`.
"""


def write_card(directory: Path, record: dict[str, Any], file: str) -> None:
    """Write ``README.md`` beside trained heads, from the record of their training."""
    train = record["settings"]["train"]
    names = ("loss", "overlap", "mass", "mass_random", "mass_best")
    curve = [f"| {line['step']} | {' | '.join(f'{line[name]:.4f}' for name in names)} |" for line in record["curve"]]
    blocks = f"; each observes the blocks before its own, of {train['observed_hosts']}"
    text = CARD.format(
        **facts_of(record),
        hidden=train["hidden_size"],
        parameters=f"{record['parameters']:,}",
        file=file,
        value={"logit": "scaled logits", "weight": "weights", "log_weight": "log weights"}[train["label"]],
        over_observers=train["over_observers"],
        over_heads=train["over_heads"],
        observers={"answer": "the answer's tokens", "later": "any later tokens"}[train["observers"]],
        num_observers=train["num_observers"],
        standardised=(", times the norm of the token's value" if train.get("value_norms") else "")
        + (", standardised per KV head" if train["standardise"] else ""),
        blocks=blocks if train["observed_hosts"] else "",
        smoothing=train["smoothing"],
        text_share=train["text_share"],
        quote_share=train["quote_share"],
        continue_share=train["continue_share"],
        num_texts=record["texts"]["number"],
        texts=", ".join(record["texts"]["places"]),
        data=f"; {train['data']} at {train['data_share']}" if train["data"] else "",
        decay=train["weight_decay"],
        held_out=train["held_out"],
        hosts=train["measured_hosts"],
        ratio=train["measured_ratio"],
        curve="\n".join(curve),
        overrides=record["overrides"],
    )
    (directory / "README.md").write_text(text, encoding="utf-8")
