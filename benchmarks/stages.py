"""A model in the stages of a pipeline: when each computes which round, how long it waits, and what it sends.

    deepspeed --num_accelerators 2 benchmarks/stages.py --out outputs/stages.json

Prefills the same document with the whole model on all ranks, and with a stage on each. Times are those of the machine's
clock, so all ranks must be on one machine. The bubble is the share of all stages' time between the first round's
beginning and the last one's end in which they do not compute; rounds that took equally long would make it
``(stages - 1) / (rounds + stages - 1)``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import apb_ds
from apb_ds.engine import prefill
from apb_ds.parallel.groups import SequenceGroup, world_group
from apb_ds.parallel.pipeline import Channel, PendingReceive
from apb_ds.report.record import environment, write_json
from apb_ds.session.model_in_use import free_memory
from benchmarks import common


@contextmanager
def noted_rounds(found: list[list[float]], device: torch.device) -> Iterator[None]:
    """Note when each round begins to compute on this rank, and when it has ended."""
    run_round, wait, send = prefill.run_round, PendingReceive.wait, Channel.start_sending

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.time()

    def note_round(*arguments: Any) -> None:
        found.append([now()])
        run_round(*arguments)
        if len(found[-1]) == 1:
            found[-1].append(now())

    def note_arrival(pending: PendingReceive) -> torch.Tensor:
        received = wait(pending)
        found[-1] = [now()]
        return received

    def note_departure(channel: Channel, tensor: torch.Tensor) -> None:
        found[-1].append(now())  # it may wait for the next stage
        send(channel, tensor)

    with (
        mock.patch.object(prefill, "run_round", note_round),
        mock.patch.object(PendingReceive, "wait", note_arrival),
        mock.patch.object(Channel, "start_sending", note_departure),
    ):
        yield


def bubble_of(stages: list[list[list[float]]]) -> float:
    """Return the share of the stages' time in which they do not compute."""
    busy = sum(ended - began for rounds in stages for began, ended in rounds)
    began, ended = min(rounds[0][0] for rounds in stages), max(rounds[-1][1] for rounds in stages)
    return 1 - busy / (len(stages) * (ended - began))


def measure(group: SequenceGroup, arguments: Any, stages: int) -> dict[str, Any]:
    """Prefill a document several times; return the times of all ranks and what they send."""
    options: dict[str, Any] = {"dtype": arguments.dtype, "stages": stages}
    if arguments.geometry is not None:
        described = yaml.safe_load(arguments.geometry.read_text(encoding="utf-8"))
        options |= {"load_format": "dummy", "geometry": described["geometry"]}
    model: Any = apb_ds.load_model(arguments.model, **options)[0]
    config = apb_ds.APBConfig(hosts=arguments.hosts, hosts_per_round=1)
    engine = apb_ds.init_inference(model, config, stages=stages)
    vocab_size: int = model.get_input_embeddings().num_embeddings
    generator = torch.Generator().manual_seed(0)
    document = torch.randint(vocab_size, (1, arguments.num_tokens), generator=generator).to(engine.device)
    query = document[:, :32]
    runs = []
    for _ in range(arguments.repeats + 1):
        rounds: list[list[float]] = []
        between = 0 if engine.stage is None else engine.stage.pipeline.bytes_between_stages
        with noted_rounds(rounds, engine.device):
            context = engine.prefill(document)
        between = 0 if engine.stage is None else engine.stage.pipeline.bytes_between_stages - between
        answer = engine.generate(
            query_ids=query, context=context, max_new_tokens=arguments.num_new, do_sample=False, eos_token_id=None
        )
        mine = {
            "prefill_s": context.prefill_s,
            "rounds": rounds,
            "bytes_between_stages": between,
            "bytes_sent": context.bytes_sent,
            "ms_per_token": engine.stats.decode_s / (arguments.num_new - 1) * 1000,
        }
        runs.append(group.gather_objects(mine))
    found: dict[str, Any] = {"stages": stages, "ranks_a_stage": group.world_size // stages, "runs": runs[1:]}
    if stages > 1:
        num_rounds, ranks_a_stage = len(context.plan.rounds), group.world_size // stages
        found["bubble"] = [bubble_of([of_rank["rounds"] for of_rank in run[::ranks_a_stage]]) for run in runs[1:]]
        found["bubble_of_equal_rounds"] = (stages - 1) / (num_rounds + stages - 1)
    return found | {"answer": answer[0].tolist()}


def main(given: list[str] | None = None) -> None:
    """Measure both, and write the record on the first rank."""
    parser = common.make_parser(__doc__)
    parser.add_argument("--model", default=common.DEFAULT_MODEL)
    parser.add_argument("--geometry", type=Path, help="a file of configs/model: random weights, others per stage")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--num-tokens", type=int, default=4096)
    parser.add_argument("--hosts", type=int, default=8)
    parser.add_argument("--num-new", type=int, default=9)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--local_rank", type=int, help="given by the launcher")
    arguments = parser.parse_args(given)
    group = world_group()
    found = []
    for stages in (1, group.world_size):
        found.append(measure(group, arguments, stages))
        free_memory()
    same = found[0].pop("answer") == found[1].pop("answer")
    if group.is_first:
        keys = ("model", "dtype", "num_tokens", "hosts", "num_new", "repeats")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        record = {**environment(device), **{key: getattr(arguments, key) for key in keys}}
        write_json(
            arguments.out,
            {
                **record,
                "ranks": group.world_size,
                "same_answers": same if arguments.geometry is None else None,
                "measured": found,
            },
        )


if __name__ == "__main__":
    main()
