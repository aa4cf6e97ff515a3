"""A server under load: the first token of a new, a known and a moved document, and answers while another is prefilled.

    python benchmarks/serving.py --out outputs/serving.json -- model=llama31_8b model.load_format=dummy method.hosts=32

What follows `--` goes to launch/serve.py, which is started on a free port of the loopback device. Documents are random
letters, one token each: the server gets a tokenizer of bytes with as many further tokens as the model has ids, so that
every token of random weights has a text. `--ranks` starts the server under the deepspeed launcher.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from apb_ds.report.record import environment, write_json  # noqa: E402

START_S = 300
LETTERS = "abcdefghijklmnopqrstuvwxyz     "
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def save_tokenizer(folder: Path, vocab_size: int) -> None:
    """Write a tokenizer of bytes, with further tokens up to the model's size."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*letters, *(f" token{number}" for number in range(vocab_size - len(letters) - 4))]
    tokenizer = Tokenizer(BPE(vocab={name: index for index, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|system|>"]})
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)


class Client:
    """Streams one answer, and notes when its tokens came."""

    def __init__(self, port: int, document: str, question: str, num_new: int, *, more: list[Any] | None = None) -> None:
        messages = [{"role": "user", "content": document}, *(more or []), {"role": "user", "content": question}]
        self.body = {
            "messages": messages, "max_tokens": num_new, "temperature": 0, "ignore_eos": True, "stream": True,
            "stream_options": {"include_usage": True},
        }  # fmt: skip
        self.port = port
        self.times: list[float] = []
        self.usage: dict[str, Any] = {}
        self.error: str | None = None
        self.asked = 0.0
        self.has_token = threading.Event()
        self._leaves = threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def start(self, model: str) -> Client:
        self.body["model"] = model
        self.thread.start()
        return self

    def wait(self) -> Client:
        self.thread.join()
        if self.error is not None:
            raise RuntimeError(self.error)
        return self

    def leave(self) -> None:
        """Close the connection at the next token."""
        self._leaves.set()
        self.thread.join()

    @property
    def first_s(self) -> float:
        return self.times[0] - self.asked

    def _run(self) -> None:
        body = json.dumps(self.body)
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        self.asked = time.perf_counter()
        try:
            connection.request("POST", "/v1/chat/completions", body, {"content-type": "application/json"})
            answer = connection.getresponse()
            if answer.status != 200:
                self.error = answer.read().decode()
                return
            for line in answer:
                if self._leaves.is_set():
                    return
                if line.startswith(b"data: {"):
                    self._take(json.loads(line[6:]))
        except OSError as error:
            self.error = repr(error)
        finally:
            self.has_token.set()
            connection.close()

    def _take(self, chunk: dict[str, Any]) -> None:
        if "error" in chunk:
            self.error = str(chunk["error"])
        self.usage = chunk.get("usage") or self.usage
        if any(choice.get("delta", {}).get("content") for choice in chunk.get("choices", [])):
            self.times.append(time.perf_counter())
            self.has_token.set()


@contextlib.contextmanager
def server(arguments: list[str], ranks: int, folder: Path) -> Iterator[tuple[int, str]]:
    """Start a server; yield its port and the model's name; end it."""
    launcher = ["deepspeed", "--num_accelerators", str(ranks)] if ranks > 1 else [sys.executable]
    command = [*launcher, str(ROOT / "launch/serve.py"), "serve.port=0", f"hydra.run.dir={folder}/run", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    said: list[str] = []
    found: dict[str, Any] = {}
    is_up = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            place = re.search(r"Serving (\S+) at http://127.0.0.1:(\d+)", line)
            if place:
                found.update(name=place[1], port=int(place[2]))
                is_up.set()
        is_up.set()

    threading.Thread(target=read, daemon=True).start()
    if not is_up.wait(START_S) or not found:
        process.kill()
        raise SystemExit(f"the server did not start:\n{''.join(said)}")
    try:
        yield found["port"], found["name"]
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        print("".join(said[-5:]), file=sys.stderr)


def text(length: int, seed: int) -> str:
    return "".join(random.Random(seed).choices(LETTERS, k=length))


def percentile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return round(ordered[min(len(ordered) - 1, int(share * len(ordered)))], 4)


def summarise(clients: list[Client], begin: float, end: float) -> dict[str, Any]:
    """Return figures of the seconds between tokens, for those that came within a span."""
    pairs = [pair for client in clients for pair in zip(client.times, client.times[1:], strict=False)]
    spans = [(earlier, later) for earlier, later in pairs if earlier < end and later > begin]
    gaps = [later - earlier for earlier, later in spans]
    return {
        "tokens": len(gaps),
        "p50_s": percentile(gaps, 0.5),
        "p99_s": percentile(gaps, 0.99),
        "max_s": round(max(gaps), 4),
        "max_began_s": round(spans[gaps.index(max(gaps))][0] - begin, 3),
        "took_s": round(end - begin, 3),
    }


def measure(port: int, model: str, options: argparse.Namespace) -> dict[str, Any]:
    documents = [text(options.num_tokens - 40, 1), *(text(options.other_tokens, seed) for seed in (2, 3))]

    def ask(index: int, question: str, num_new: int = 8) -> Client:
        return Client(port, documents[index], question, num_new).start(model)

    record: dict[str, Any] = {"document_tokens": options.num_tokens, "other_tokens": options.other_tokens}
    ask(1, "warm up").wait()
    ask(1, "and once more").wait()
    record["first_token_new_s"] = round(ask(0, "what is new?").wait().first_s, 3)
    known = [ask(0, f"what is known of {number}?").wait() for number in range(options.repeats)]
    record["first_token_known_s"] = [round(client.first_s, 3) for client in known]
    record["cached_tokens"] = known[-1].usage["prompt_tokens_details"]["cached_tokens"]

    streams = [ask(0, f"tell me all about {number}", options.stream_tokens) for number in range(options.streams)]
    while any(len(stream.times) < options.settled and stream.error is None for stream in streams):
        time.sleep(0.01)
    began = time.perf_counter()
    time.sleep(options.quiet_s)
    asked = time.perf_counter()
    other = ask(2, "what is this?").wait()
    first = other.times[0]
    time.sleep(0.2)
    for stream in streams:
        stream.leave()
    record["streams"] = options.streams
    record["gaps_before"] = summarise(streams, began, asked)
    record["gaps_during_prefill"] = summarise(streams, asked, first)
    record["first_token_of_other_s"] = round(other.first_s, 3)

    moved = ask(1, "where were you?").wait()  # known since the warm-up, if it has not been moved away meanwhile
    back = ask(0, "are you back?").wait()
    record["first_token_after_others_s"] = [round(client.first_s, 3) for client in (moved, back)]
    record["cached_after_others"] = [client.usage["prompt_tokens_details"]["cached_tokens"] for client in (moved, back)]
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("GET", "/metrics")
    said = connection.getresponse().read().decode()
    pattern = r'^(apb_load_seconds_(?:sum|count)\{source="\w+"\}|apb_documents\{place="\w+"\}) (\S+)$'
    record["metrics"] = {name: float(value) for name, value in re.findall(pattern, said, re.M)}
    return record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-tokens", type=int, default=128_000, help="of the document that is asked about")
    parser.add_argument("--other-tokens", type=int, default=100_000, help="of those that are prefilled meanwhile")
    parser.add_argument("--vocab-size", type=int, default=128_256)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--stream-tokens", type=int, default=2000)
    parser.add_argument("--settled", type=int, default=24, help="tokens of each stream before it is measured")
    parser.add_argument("--quiet-s", type=float, default=2.0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("outputs/serving.json"))
    parser.add_argument("arguments", nargs="*", help="of launch/serve.py")
    options = parser.parse_args()
    import torch

    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(Path(folder) / "tokenizer", options.vocab_size)
        arguments = [f"model.tokenizer={folder}/tokenizer", *options.arguments]
        with server(arguments, options.ranks, Path(folder)) as (port, model):
            record = measure(port, model, options)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record |= {"arguments": options.arguments, "ranks": options.ranks, **environment(device)}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.out, record)
    print(json.dumps({name: value for name, value in record.items() if name not in ("packages",)}, indent=1))


if __name__ == "__main__":
    main()
