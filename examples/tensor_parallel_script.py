"""A script that split a model over ranks by DeepSpeed's tensor parallelism, and now does so by APB's sharded weights.

deepspeed --num_gpus 2 examples/tensor_parallel_script.py <model> <text file> "<question>"
"""

from __future__ import annotations

import sys

import deepspeed
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import apb_ds

*_, path, text, question = sys.argv  # the launcher's --local_rank comes first
deepspeed.init_distributed()
dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)

# Before: deepspeed.init_inference(model, tensor_parallel={"tp_size": world_size}, dtype=dtype)
engine = apb_ds.init_inference(model, apb_ds.APBConfig(hosts=8), shard_weights=True)

tokenizer = AutoTokenizer.from_pretrained(path)
with open(text, encoding="utf-8") as file:
    parts = [file.read(), f"\n\n{question}\n"]
document, query = (tokenizer(part, add_special_tokens=False, return_tensors="pt").input_ids for part in parts)
# Before: engine.generate(torch.cat([document, query], dim=1), max_new_tokens=16, do_sample=False)
tokens = engine.generate(document, query, max_new_tokens=16, do_sample=False)
if engine.group.is_first:
    print("Answer:", tokenizer.decode(tokens[0]))
