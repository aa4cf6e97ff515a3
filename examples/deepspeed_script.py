"""An ordinary DeepSpeed inference script that answers a question about a long text, and gains APB in three lines.

python examples/deepspeed_script.py --tiny
deepspeed --num_accelerators 2 examples/deepspeed_script.py --tiny
deepspeed --num_accelerators 2 examples/deepspeed_script.py --model HuggingFaceTB/SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse
import os
from typing import Any

import deepspeed
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import apb_ds  # APB, line 1 of 3

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
FACTS = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
NEEDLE = "The pass key is 68213. Remember it. The pass key is 68213. "
QUESTION = "What is the pass key?"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=MODEL, help="a model's directory or its name on the Hugging Face hub")
    parser.add_argument("--tiny", action="store_true", help="a small random model instead: seconds, no download")
    parser.add_argument("--num_facts", type=int, default=60, help="length of the text, in repetitions of some facts")
    parser.add_argument("--max_new_tokens", type=int, default=16)
    parser.add_argument("--local_rank", type=int, default=0, help="set by the deepspeed launcher")
    return parser.parse_args()


def load_tiny() -> tuple[Any, Any, torch.Tensor, torch.Tensor]:
    """Return a random model, no tokenizer, a document (1, 400) and a query (1, 8) of random ids."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    ids = torch.randint(0, 256, (1, 408))
    return LlamaForCausalLM(config).eval(), None, ids[:, :400], ids[:, 400:]


def load_model(path: str, num_facts: int) -> tuple[Any, Any, torch.Tensor, torch.Tensor]:
    """Return model, tokenizer, and the ids of a chat: a document that holds a pass key, and a question about it."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    text = FACTS * (num_facts // 2) + NEEDLE + FACTS * (num_facts - num_facts // 2)
    messages = [{"role": "user", "content": f"{text}\n\n{QUESTION}"}]
    whole: Any = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    cut = whole.rindex(QUESTION)
    document, query = (
        tokenizer(part, return_tensors="pt", add_special_tokens=False).input_ids for part in (whole[:cut], whole[cut:])
    )
    return model, tokenizer, document, query


def main() -> None:
    arguments = parse_arguments()
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    loaded = load_tiny() if arguments.tiny else load_model(arguments.model, arguments.num_facts)
    model, tokenizer, document, query = loaded

    engine = deepspeed.init_inference(model, dtype=model.dtype)
    apb_ds.attach(engine, apb_ds.APBConfig(hosts=8))  # APB, line 2 of 3: the ranks meet, unless they have already

    prompt = torch.cat([document, query], dim=1).to(engine.module.device)
    tokens = engine.generate(
        input_ids=prompt,
        query_length=query.shape[1],  # APB, line 3 of 3: which of the prompt's last tokens are the question
        max_new_tokens=arguments.max_new_tokens,
        do_sample=False,
    )

    if rank == 0:
        answer = tokens[0, prompt.shape[1] :].tolist()
        print(f"{prompt.shape[1]} prompt tokens on {world_size} ranks")
        print("Answer:", answer if tokenizer is None else tokenizer.decode(answer, skip_special_tokens=True).strip())


if __name__ == "__main__":
    main()
