"""An ordinary transformers script for torchrun, which gains APB in three lines, without DeepSpeed's launcher.

torchrun --nproc_per_node 2 examples/torchrun_script.py <model> <text file> "<question>"
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import apb_ds  # APB, line 1 of 3

path, text, question = sys.argv[1:]
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if torch.cuda.is_available() else torch.device("cpu")
if device.type == "cuda":
    torch.cuda.set_device(device)
torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")  # taken by the engine
model: Any = AutoModelForCausalLM.from_pretrained(path)
model.to(device)

engine = apb_ds.init_inference(model, apb_ds.APBConfig(hosts=8))  # APB, line 2 of 3

tokenizer = AutoTokenizer.from_pretrained(path)
with open(text, encoding="utf-8") as file:
    parts = [file.read(), f"\n\n{question}\n"]
document, query = (tokenizer(part, add_special_tokens=False, return_tensors="pt").input_ids for part in parts)
tokens = engine.generate(document, query, max_new_tokens=16, do_sample=False)  # APB, line 3 of 3
if torch.distributed.get_rank() == 0:
    print("Answer:", tokenizer.decode(tokens[0]))
