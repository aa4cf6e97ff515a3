"""Many clients at once, well-behaved and not: whether every answer comes, is the right one, and memory stays the same.

    python benchmarks/load.py --requests 1000 --out outputs/load.json

Starts `launch/serve.py` on the loopback device (`--ranks` under the deepspeed launcher; what follows `--` goes to it),
asks each chat once alone, and then all of them again and again from a bounded number of clients. Some read a stream,
some leave in the middle of one, some have a wrong key, a bad body or too large a one. *Held*: answered as when alone.
*Refused*: with the status that was to be expected. *Lost*: everything else.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import openai
import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from apb_ds.report.record import environment, write_json  # noqa: E402
from benchmarks.serving import percentile, server  # noqa: E402

KEY = "load"
SETTINGS = (f"serve.api_key={KEY}", "serve.min_document=256", "serve.body_mib=1", "serve.max_waiting=256")
NAMES = ("Ada", "Bruno", "Clara", "Dario", "Elin", "Farid", "Greta", "Hugo")
PLACES = ("north gate", "east pier", "fish hall", "old slip", "office", "signal mast", "quay", "customs house")
KINDS = ("plain", "stream", "leave", "key", "body", "large")
WEIGHTS = (40, 40, 10, 4, 3, 3)


def make_chats(documents: int, questions: int, seed: int) -> list[list[dict[str, str]]]:
    """Return chats about some documents of about 600 tokens."""
    draw = random.Random(seed)
    chats = []
    for _ in range(documents):
        codes = {place: draw.randint(1000, 9999) for place in PLACES}
        lines = [f"{draw.choice(NAMES)} walked to the {draw.choice(PLACES)} and back." for _ in range(50)]
        lines += [f"The code of the {place} is {code}." for place, code in codes.items()]
        draw.shuffle(lines)
        document = {"role": "user", "content": "\n".join(lines)}
        for place in draw.sample(PLACES, questions):
            chats.append([document, {"role": "user", "content": f"What is the code of the {place}?"}])
    return chats


class Load:
    """The clients of one server, and what became of their requests."""

    def __init__(self, port: int, model: str, chats: list[Any], options: argparse.Namespace) -> None:
        self.client = openai.AsyncOpenAI(
            base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0, timeout=600
        )
        self.chats = chats
        self.given = {"model": model, "max_tokens": options.new_tokens, "temperature": 0}
        self.places = asyncio.Semaphore(options.clients)
        self.found: Counter[str] = Counter()
        self.lost: list[str] = []
        self.seconds: list[float] = []
        self.wanted: list[str] = []

    async def learn(self) -> None:
        """Ask every chat once, alone."""
        self.wanted = [await self._plain(index) for index in range(len(self.chats))]

    async def one(self, number: int, kind: str) -> None:
        """Send one request, and note what became of it."""
        index = number % len(self.chats)
        async with self.places:
            began = time.perf_counter()
            try:
                await getattr(self, f"_{kind}_of")(index)
                if kind in ("plain", "stream"):
                    self.seconds.append(time.perf_counter() - began)
            except Exception as error:
                self.lost.append(f"{kind}: {type(error).__name__}: {error}"[:200])

    async def _plain(self, index: int) -> str:
        answer = await self.client.chat.completions.create(messages=self.chats[index], **self.given)
        return answer.choices[0].message.content or ""

    async def _plain_of(self, index: int) -> None:
        self._check(index, await self._plain(index))

    async def _stream_of(self, index: int) -> None:
        stream = await self.client.chat.completions.create(messages=self.chats[index], stream=True, **self.given)
        self._check(index, "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]))

    async def _leave_of(self, index: int) -> None:
        given = {**self.given, "max_tokens": 200, "extra_body": {"ignore_eos": True}}
        stream = await self.client.chat.completions.create(messages=self.chats[index], stream=True, **given)
        await stream.__anext__()
        await stream.close()
        self.found["left"] += 1

    async def _key_of(self, index: int) -> None:
        await self._refused(self.client.with_options(api_key="wrong"), self.chats[index], 401)

    async def _body_of(self, index: int) -> None:
        await self._refused(self.client, self.chats[index], 400, extra_body={"top_q": 0.5})

    async def _large_of(self, index: int) -> None:
        await self._refused(self.client, [{"role": "user", "content": "word " * 250_000}], 413)

    async def _refused(self, client: Any, messages: Any, status: int, **more: Any) -> None:
        try:
            await client.chat.completions.create(messages=messages, **self.given, **more)
        except openai.APIStatusError as error:
            if error.status_code != status:
                raise
            self.found[f"refused {status}"] += 1
            return
        raise ValueError(f"status {status} was expected")

    def _check(self, index: int, text: str) -> None:
        if text != self.wanted[index]:
            raise ValueError(f"{text!r} instead of {self.wanted[index]!r}")
        self.found["held"] += 1


def memory_mib() -> float:
    """Return the resident memory of the server's processes, which this process has started."""
    return round(sum(one.memory_info().rss for one in psutil.Process().children(recursive=True)) / 2**20, 1)


async def measure(port: int, model: str, options: argparse.Namespace) -> dict[str, Any]:
    chats = make_chats(options.documents, options.questions, seed=1)
    load = Load(port, model, chats, options)
    await load.learn()
    draw = random.Random(2)
    kinds = draw.choices(KINDS, WEIGHTS, k=options.requests)
    memory = [memory_mib()]
    began = time.perf_counter()
    for first in range(0, options.requests, options.block):
        numbers = range(first, min(first + options.block, options.requests))
        await asyncio.gather(*(load.one(number, kinds[number]) for number in numbers))
        memory.append(memory_mib())
    seconds = time.perf_counter() - began
    await load.client.close()
    return {
        "requests": options.requests,
        "documents": options.documents,
        "chats": len(chats),
        "clients": options.clients,
        "seconds": round(seconds, 1),
        "held": load.found["held"],
        "refused": {name.split()[1]: number for name, number in load.found.items() if name.startswith("refused")},
        "left": load.found["left"],
        "lost": len(load.lost),
        "why_lost": load.lost[:5],
        "answer_p50_s": percentile(load.seconds, 0.5),
        "answer_p99_s": percentile(load.seconds, 0.99),
        "memory_mib": memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--documents", type=int, default=5)
    parser.add_argument("--questions", type=int, default=4, help="about each document")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=8)
    parser.add_argument("--block", type=int, default=100, help="requests between two looks at the memory")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("outputs/load.json"))
    parser.add_argument("arguments", nargs="*", help="of launch/serve.py")
    options = parser.parse_args()
    import torch

    with tempfile.TemporaryDirectory() as folder:
        arguments = [*SETTINGS, *options.arguments]
        with server(arguments, options.ranks, Path(folder)) as (port, model):
            record = asyncio.run(measure(port, model, options))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record |= {"arguments": arguments, "ranks": options.ranks, **environment(device)}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, record)
    print(json.dumps({name: value for name, value in record.items() if name not in ("versions", "git")}, indent=1))


if __name__ == "__main__":
    main()
