"""A grid of data x sequence x tensor ranks with a Megatron-style mpu: each data rank answers its own question.

deepspeed --num_gpus 4 examples/mpu_script.py <data> <tensor> <model> <text file> "<question>" ...
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from torch.distributed.device_mesh import init_device_mesh
from transformers import AutoModelForCausalLM, AutoTokenizer

import apb_ds


class Mpu:
    """The groups of a framework with its own parallelism, as Megatron's parallel_state names them."""

    def get_sequence_parallel_group(self) -> Any:  # the one method that APB calls
        return grid.get_group("sequence")


data, tensor, path, text, *questions = (value for value in sys.argv[1:] if not value.startswith("--local_rank"))
deepspeed.init_distributed()
shape = (int(data), torch.distributed.get_world_size() // (int(data) * int(tensor)), int(tensor))
kind = "cuda" if torch.cuda.is_available() else "cpu"
grid = init_device_mesh(kind, shape, mesh_dim_names=("data", "sequence", "tensor"))
engine = apb_ds.init_inference(AutoModelForCausalLM.from_pretrained(path), apb_ds.APBConfig(hosts=8), mpu=Mpu())
tokenizer = AutoTokenizer.from_pretrained(path)
parts = [Path(text).read_text(encoding="utf-8"), f"\n\n{questions[grid.get_local_rank('data')]}\n"]
document, query = (tokenizer(part, add_special_tokens=False, return_tensors="pt").input_ids for part in parts)
tokens = engine.generate(document, query, max_new_tokens=16, do_sample=False)  # the same on a data rank's ranks
if engine.group.is_first and grid.get_local_rank("tensor") == 0:
    print("Answer:", tokenizer.decode(tokens[0]))
