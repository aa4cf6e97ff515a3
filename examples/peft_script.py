"""Two peft adapters over one model, switched between requests; each answers from its own context.

python examples/peft_script.py <model> <adapter> <other adapter> <text file> "<question>"
"""

from __future__ import annotations

import sys

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import apb_ds

*_, path, one, other, text, question = sys.argv
base = AutoModelForCausalLM.from_pretrained(path)
model = PeftModel.from_pretrained(base, one, adapter_name="one")
model.load_adapter(other, adapter_name="other")

engine = apb_ds.init_inference(base, apb_ds.APBConfig(hosts=8))  # peft has put the adapters into its layers

tokenizer = AutoTokenizer.from_pretrained(path)
with open(text, encoding="utf-8") as file:
    parts = [file.read(), f"\n\n{question}\n"]
document, query = (tokenizer(part, add_special_tokens=False, return_tensors="pt").input_ids for part in parts)
contexts = {}
for name in ("one", "other", "one"):
    model.set_adapter(name)
    if name not in contexts:  # keys and values depend on the adapter: another one's context is refused
        contexts[name] = engine.prefill(document, query)
    tokens = engine.generate(query_ids=query, context=contexts[name], max_new_tokens=16, do_sample=False)
    if engine.group.is_first:
        print(f"Answer of {name}:", tokenizer.decode(tokens[0]))
