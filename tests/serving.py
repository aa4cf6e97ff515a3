"""A server's engine half in this process: a tiny model, its worker in a thread, and clients that collect events."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import apb_ds
from apb_ds.parallel.groups import SequenceGroup
from apb_ds.serving.answers import Answer
from apb_ds.serving.config import ServeConfig
from apb_ds.serving.documents import Documents, Limits
from apb_ds.serving.errors import failed
from apb_ds.serving.metrics import Metrics
from apb_ds.serving.requests import Delta, Ended, Event, Failed, Message, Options, Progress
from apb_ds.serving.service import Request, Service
from apb_ds.serving.worker import Worker
from tests import models
from tests.tiny_checkpoint import byte_tokenizer

WAIT_S = 60.0
MIN_DOCUMENT = 48
GREEDY = Options(max_new_tokens=6, temperature=0.0)
METHOD = {"hosts": 4, "anchor_length": 8, "passing_length": 8}
PLENTY = Limits(2**30, 0, 0, 2**30)


def tiny_engine(group: SequenceGroup | None = None, method: dict[str, Any] = METHOD) -> Any:
    """Return an engine of a tiny Llama whose every token has a text, over all ranks."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    model = models.llama(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=tokenizer.eos_token_id)
    return apb_ds.init_inference(model, apb_ds.APBConfig(**method), group=group)


@dataclass
class Client:
    """Collects what a request is told.

    Attributes
    ----------
    tokens, text : of the answer so far
    events : all of them
    """

    events: list[Event] = field(default_factory=list)
    request: Request | None = None
    _done: threading.Event = field(default_factory=threading.Event)
    has_token: threading.Event = field(default_factory=threading.Event)

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Delta):
            self.has_token.set()
        if isinstance(event, (Ended, Failed)):
            self._done.set()

    @property
    def tokens(self) -> list[int]:
        return [token for event in self.events if isinstance(event, Delta) for token in event.tokens]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events if isinstance(event, Delta))

    @property
    def progress(self) -> list[Progress]:
        return [event for event in self.events if isinstance(event, Progress)]

    def wait(self) -> Ended:
        """Wait for the answer's end; a failure is raised."""
        assert self._done.wait(WAIT_S), self.events
        last = self.events[-1]
        if isinstance(last, Failed):
            raise last.error
        assert isinstance(last, Ended)
        return last


@dataclass
class Running:
    """A running engine half."""

    engine: Any
    service: Service
    worker: Worker

    def ask(self, *messages: Message | str, options: Options = GREEDY) -> Client:
        """Ask a chat; texts are a user's messages."""
        chat = [one if isinstance(one, Message) else Message("user", (one,)) for one in messages]
        client = Client()
        client.request = self.service.submit(self.service.chat_prompt(chat), options, client)
        return client

    def expected(self, *messages: Message | str, options: Options = GREEDY) -> list[int]:
        """Return the tokens that `engine.generate` gives for the same chat."""
        chat = [one if isinstance(one, Message) else Message("user", (one,)) for one in messages]
        prompt = self.service.chat_prompt(chat)
        document, rest = prompt.document.unsqueeze(0), prompt.rest.unsqueeze(0)
        if not prompt.key:
            document, rest = rest[:, :1], rest[:, 1:]
        arguments = Answer(self.service.tokenizer, options, lambda event: None).arguments()
        context = self.engine.prefill(document)
        tokens = self.engine.generate(
            query_ids=rest, context=context, max_new_tokens=options.max_new_tokens, seed=options.seed, **arguments
        )
        return list(tokens[0].tolist())


def make_half(
    engine: Any,
    config: ServeConfig,
    documents: Documents,
    control: SequenceGroup,
    cache_dir: Path | None = None,
) -> tuple[Service | None, Worker]:
    """Return a rank's service, on the first one, and worker."""
    service = None
    if engine.group.is_first:
        service = Service(engine, byte_tokenizer(), "tiny", config, documents, 2**28, Metrics())
    worker = Worker(
        engine,
        control,
        service,
        max_sequences=config.max_sequences,
        max_bytes=2**28,
        step_every_s=config.step_every_s,
        cache_dir=cache_dir,
    )
    return service, worker


@contextlib.contextmanager
def running(
    engine: Any,
    limits: Limits = PLENTY,
    cache_dir: Path | None = None,
    documents: Documents | None = None,
    **settings: Any,
) -> Iterator[Running]:
    """Serve one rank in a thread; stop it, and check that nothing is left over."""
    config = ServeConfig(**{"min_document": MIN_DOCUMENT, "step_every_s": 0.0, "stop_s": 30.0, **settings})
    service, worker = make_half(engine, config, documents or Documents(limits), engine.group, cache_dir)
    assert service is not None
    errors: list[BaseException] = []

    def run() -> None:
        try:
            worker.run()
        except BaseException as error:
            errors.append(error)
            service.fail(failed(repr(error)))
            raise

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield Running(engine, service, worker)
    finally:
        worker.stop()
        thread.join(WAIT_S)
    assert not thread.is_alive() and not errors
    assert not service.health()["running"] and not service.health()["waiting"]
