"""The server's settings, the ``serve`` group of the config."""

from __future__ import annotations

import ipaddress
import logging
from dataclasses import dataclass, field
from typing import Any

from apb_ds.config import check_bool, check_integer, is_number
from apb_ds.engine.split import MIN_DOCUMENT, SPLIT_TEXT
from apb_ds.tasks.template import check_arguments
from apb_ds.tasks.text import STANDARD_INPUT, check_quoted, check_text, check_text_source, clean

LOOPBACK = "127.0.0.1"
MAX_PORT = 65535
INTEGERS = {
    "min_document": 1,
    "max_rest": 1,
    "default_new_tokens": 1,
    "max_sequences": 1,
    "max_waiting": 0,
    "max_connections": 1,
}
OPTIONAL_TEXTS = {"api_key": "a text or @FILE", "model_name": "a text", "cache_dir": "a folder"}
POSITIVE = ("body_mib", "body_s", "keep_alive_s")
POSITIVE_OR_NONE = ("device_gib", "request_s")
NOT_NEGATIVE = ("step_every_s", "stop_s")
NOT_NEGATIVE_OR_NONE = ("host_gib", "disk_gib")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServeConfig:
    """How the server listens, what it takes for a document, and what it keeps.

    Parameters
    ----------
    host, port : where it listens; 0 for any free port
    api_key : what clients must send as a bearer token, text or ``@FILE``; None for none
    model_name : as clients give it; None for the name of the model's folder or file
    min_document : tokens from which on the beginning of a prompt is a document, which is kept
    template : arguments of the chat template, such as ``{"enable_thinking": False}``
    split : the text before whose last occurrence a lone message or a completion's prompt is cut into document and
        question
    max_rest : tokens that may follow a document, of questions and turns
    default_new_tokens : of an answer whose request does not say how long it may be
    max_sequences : answers that decode at a time
    max_waiting : requests that wait; further ones are refused
    max_connections : open ones of clients; further ones are refused
    step_every_s : seconds between two tokens of running answers while a document is prefilled, about
    device_gib, host_gib, disk_gib : of each rank, for documents and conversations; None for a share of what is free,
        0 for nothing (host and disk)
    cache_dir : where documents are kept on disk; None for nowhere
    body_mib : the largest body of a request
    body_s : seconds that a request may take to arrive: its head, and then its body
    request_s : seconds that a request may take; None for no limit
    keep_alive_s : seconds after which a stream without tokens gets a comment
    stop_s : seconds that running answers get once the server is told to stop
    warm_up : on GPUs, whether made-up questions are answered first, so that no request waits for compilers

    Raises
    ------
    ValueError
        For a value out of its range, naming the setting.
    """

    host: str = LOOPBACK
    port: int = 8000
    api_key: str | None = None
    model_name: str | None = None
    min_document: int = MIN_DOCUMENT
    split: str = SPLIT_TEXT
    max_rest: int = 16384
    default_new_tokens: int = 1024
    template: dict[str, Any] = field(default_factory=dict)
    max_sequences: int = 32
    max_waiting: int = 64
    max_connections: int = 512
    step_every_s: float = 0.1
    device_gib: float | None = None
    host_gib: float | None = None
    disk_gib: float | None = None
    cache_dir: str | None = None
    body_mib: float = 32.0
    body_s: float = 60.0
    request_s: float | None = None
    keep_alive_s: float = 5.0
    stop_s: float = 20.0
    warm_up: bool = True

    def __post_init__(self) -> None:
        self._check_texts()
        check_integer("serve.port", self.port, 0)
        if self.port > MAX_PORT:
            raise ValueError(f"serve.port={self.port} must be at most {MAX_PORT}; 0 takes any free port.")
        for name, minimum in INTEGERS.items():
            check_integer(f"serve.{name}", getattr(self, name), minimum)
        for name in (*POSITIVE, *POSITIVE_OR_NONE):
            self._check_number(name, "greater than 0", is_optional=name in POSITIVE_OR_NONE)
        for name in (*NOT_NEGATIVE, *NOT_NEGATIVE_OR_NONE):
            self._check_number(name, "at least 0", is_optional=name in NOT_NEGATIVE_OR_NONE)
        check_bool("serve.warm_up", self.warm_up)
        try:
            check_arguments(self.template)
        except ValueError as error:
            raise ValueError(name_template(error)) from error
        if self.api_key is None and not is_loopback(self.host):
            logger.warning(
                "serve.host=%s lets other machines connect, and nobody needs a key: set serve.api_key.", self.host
            )

    def _check_texts(self) -> None:
        check_text("serve.host", self.host, "a name or an address")
        for name, accepted in OPTIONAL_TEXTS.items():
            if getattr(self, name) is not None:
                check_text(f"serve.{name}", getattr(self, name), f"{accepted}, or null for none")
        if self.api_key == STANDARD_INPUT:
            raise ValueError("serve.api_key=- is not read from standard input; give a text or @FILE.")
        if self.api_key is not None:
            check_text_source("serve.api_key", self.api_key)
        check_quoted("serve.split", self.split)
        if not isinstance(self.split, str) or not self.split or clean(self.split, may_be_blank=True)[1]:
            raise ValueError(f"serve.split={self.split!r} must be a text that is not empty.")

    def _check_number(self, name: str, allowed: str, *, is_optional: bool) -> None:
        value = getattr(self, name)
        if value is None and is_optional:
            return
        if not is_number(value) or value < 0 or (value == 0 and allowed == "greater than 0"):
            raise ValueError(f"serve.{name}={value!r} must be a number {allowed}.")


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def name_template(error: ValueError) -> str:
    """Return what is wrong with the arguments of the chat template, with the server's name for them."""
    return str(error).replace("task.template", "serve.template")
