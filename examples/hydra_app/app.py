"""A Hydra application that composes APB's settings into its own config.

python examples/hydra_app/app.py model=<model> text=<text file> 'question=<question>' apb_ds.method.hosts=16
python examples/hydra_app/app.py -m apb_ds/method=apb,star model=<model> text=<text file> 'question=<question>'
"""

from __future__ import annotations

from pathlib import Path

import hydra
from omegaconf import DictConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

import apb_ds


@hydra.main(version_base="1.3", config_path=".", config_name="config")
def main(config: DictConfig) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(config.model), AutoTokenizer.from_pretrained(config.model)
    engine = apb_ds.init_inference(model, config.apb_ds.method)
    parts = [Path(config.text).read_text(encoding="utf-8"), f"\n\n{config.question}\n"]
    document, query = (tokenizer(part, add_special_tokens=False, return_tensors="pt").input_ids for part in parts)
    tokens = engine.generate(document, query, max_new_tokens=config.max_new_tokens, do_sample=False)
    if engine.group.is_first:
        print("Answer:", tokenizer.decode(tokens[0]))


if __name__ == "__main__":
    main()
