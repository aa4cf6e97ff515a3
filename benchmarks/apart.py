"""Questions about short documents, each its own, answered as an evaluation does: one at a time, and several together.

    python benchmarks/apart.py --out outputs/apart.json

SmolLM2-135M's sizes, random weights, random ids, on one rank; answers do not end early.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from apb_ds import APBConfig, init_inference
from apb_ds.bench.sequences import PLAIN_GREEDY, random_queries
from apb_ds.engine.engine import APBEngine
from apb_ds.loading import ModelConfig, load_model
from apb_ds.report.record import environment, write_json
from apb_ds.tasks.queue import AnswerQueue, Question
from benchmarks import common

SMOLLM2 = Path(__file__).resolve().parents[1] / "configs" / "model" / "smollm2.yaml"


def answer(engine: APBEngine, documents: list[Any], queries: list[Any], num_new: int, sequences: int) -> dict[str, Any]:
    """Answer a question about each document, so many at a time; return seconds, and the answers' ids."""
    prefill_s, began = 0.0, time.perf_counter()
    ended = []
    with AnswerQueue(engine, sequences) as queue:
        for number, (document, query) in enumerate(zip(documents, queries, strict=True)):
            context = queue.prefill(document, None, max_positions=document.shape[1] + query.shape[1] + num_new)
            assert context is not None
            prefill_s += context.prefill_s
            queue.ask(Question(query, context, max_new_tokens=num_new, arguments=PLAIN_GREEDY, tag=number))
            del context
            while queue.is_full:
                ended += queue.step()
        while len(queue):
            ended += queue.step()
    total_s = time.perf_counter() - began
    for one in ended:
        if one.error is not None:
            raise one.error
    stats = queue.stats
    return {
        "sequences": sequences,
        "total_s": total_s,
        "prefill_s": prefill_s,
        "query_s": stats.query_s,
        "decode_s": stats.decode_s,
        "new_tokens": stats.new_tokens,
        "answers": [one.tokens for one in sorted(ended, key=lambda one: one.question.tag)],
    }


def main(given: list[str] | None = None) -> None:
    """Measure, print, and write the record after each number of sequences."""
    parser = common.make_parser(__doc__)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--documents", type=int, default=50)
    parser.add_argument("--num-tokens", type=int, default=3900)
    parser.add_argument("--num-query", type=int, default=64)
    parser.add_argument("--num-new", type=int, default=30)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--num-layers", type=int)
    arguments = parser.parse_args(given)
    values = yaml.safe_load(SMOLLM2.read_text(encoding="utf-8"))
    settings = {"load_format": "dummy", "path": None, "dtype": arguments.dtype, "num_layers": arguments.num_layers}
    loaded = load_model(ModelConfig.from_dict(values | settings))
    engine = init_inference(loaded.model, APBConfig(hosts=8))
    vocab_size = loaded.model.config.vocab_size
    documents, queries = (
        [ids.to(loaded.device) for ids in random_queries(arguments.documents, length, vocab_size, seed)]
        for seed, length in enumerate((arguments.num_tokens, arguments.num_query))
    )
    record: dict[str, Any] = {key: value for key, value in vars(arguments).items() if key != "out"}
    record |= {"runs": [], **environment(loaded.device)}
    first: list[list[int]] | None = None
    for sequences in arguments.sequences:
        few = max(2, min(sequences, arguments.documents))
        answer(engine, documents[:few], queries[:few], 8, sequences)  # compiles and records
        run = answer(engine, documents, queries, arguments.num_new, sequences)
        answers = run.pop("answers")
        first = first or answers
        run["same_answers"] = sum(one == other for one, other in zip(answers, first, strict=True))
        record["runs"].append(run)
        print(run, flush=True)
        write_json(arguments.out, record)


if __name__ == "__main__":
    main()
