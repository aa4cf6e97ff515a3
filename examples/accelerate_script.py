"""An ordinary accelerate script, which gains APB in three lines: all its processes share a request.

accelerate launch --num_processes 2 examples/accelerate_script.py <model> <text file> "<question>"
"""

from __future__ import annotations

import sys

from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

import apb_ds  # APB, line 1 of 3

path, text, question = sys.argv[1:]
accelerator = Accelerator()  # makes the process group, which the engine takes
model = accelerator.prepare(AutoModelForCausalLM.from_pretrained(path))  # in DistributedDataParallel

engine = apb_ds.init_inference(accelerator.unwrap_model(model), apb_ds.APBConfig(hosts=8))  # APB, line 2 of 3

tokenizer = AutoTokenizer.from_pretrained(path)
with open(text, encoding="utf-8") as file:
    parts = [file.read(), f"\n\n{question}\n"]
document, query = (tokenizer(part, add_special_tokens=False, return_tensors="pt").input_ids for part in parts)
tokens = engine.generate(document, query, max_new_tokens=16, do_sample=False)  # APB, line 3 of 3
accelerator.print("Answer:", tokenizer.decode(tokens[0]))
