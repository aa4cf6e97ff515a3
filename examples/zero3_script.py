"""An ordinary ZeRO-3 inference script, which gains APB in three lines: the ranks hold one copy of the weights together.

deepspeed --num_gpus 2 examples/zero3_script.py <model> <text file> "<question>"
"""

from __future__ import annotations

import sys

import deepspeed
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import HfDeepSpeedConfig

import apb_ds  # APB, line 1 of 3

*_, path, text, question = sys.argv  # the launcher's --local_rank comes first
on_gpu = torch.cuda.is_available()
config = {
    "train_micro_batch_size_per_gpu": 1,
    "bf16": {"enabled": on_gpu},
    "zero_optimization": {"stage": 3},
}
deepspeed.init_distributed()
partitions = HfDeepSpeedConfig(config)  # while it lives, from_pretrained keeps this rank's part of what it reads
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16 if on_gpu else torch.float32)
model = deepspeed.initialize(model=model, config=config)[0].module

engine = apb_ds.init_inference(model, apb_ds.APBConfig(hosts=8))  # APB, line 2 of 3

tokenizer = AutoTokenizer.from_pretrained(path)
with open(text, encoding="utf-8") as file:
    parts = [file.read(), f"\n\n{question}\n"]
document, query = (tokenizer(part, add_special_tokens=False, return_tensors="pt").input_ids for part in parts)
tokens = engine.generate(document, query, max_new_tokens=16, do_sample=False)  # APB, line 3 of 3
if engine.group.is_first:
    print("Answer:", tokenizer.decode(tokens[0]))
