"""What passes between HTTP and the engine: prompts, options, events, and who takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from apb_ds.serving.errors import ApiError


@dataclass(frozen=True)
class Message:
    """One message of a chat: who says it, and its texts, of which a part may be a document of its own."""

    role: str
    parts: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Prompt:
    """A prompt as ids, cut into a document and the rest.

    Attributes
    ----------
    document : (n,), int64, on the CPU, ids that are prefilled and kept; none for a short prompt
    rest : (r,), int64, ids that follow; at least one
    key : of the document, empty for none
    """

    document: Tensor
    rest: Tensor
    key: str = ""

    @property
    def num_tokens(self) -> int:
        return len(self.document) + len(self.rest)


@dataclass(frozen=True)
class Options:
    """How a prompt is answered.

    Attributes
    ----------
    max_new_tokens : None for as many as there are positions left
    temperature : 0 for the likeliest token
    seed : None for another answer each time
    stop : texts before which the answer ends
    top_logprobs : how many likeliest tokens' log-probabilities come with each token; None for none at all
    logit_bias : what is added to logits, by token
    ignore_eos : whether the answer goes on after an end token
    continues : whether the answer's text goes on from the prompt's last word, as a completion's does
    """

    max_new_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    top_logprobs: int | None = None
    ignore_eos: bool = False
    continues: bool = False


@dataclass(frozen=True)
class Progress:
    """How far the prefill of a request's document is, in layers of rounds."""

    done: int
    total: int


@dataclass(frozen=True)
class TokenLogprobs:
    """Log-probabilities of a token: its own, and the likeliest tokens' by id, in order."""

    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Delta:
    """More of an answer.

    Attributes
    ----------
    text : may be empty, while characters or a stop text are incomplete
    tokens : ids that came since the last delta
    logprobs : of these tokens, if they were asked for
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


@dataclass(frozen=True)
class Ended:
    """An answer's end.

    Attributes
    ----------
    reason : ``stop`` or ``length``
    new_tokens : of the answer
    cached_tokens : of the prompt, that were there already
    wait_s, prefill_s, query_s, decode_s : seconds until the first token, of which for the document and the query, and
        of the tokens after it
    """

    reason: str
    new_tokens: int
    cached_tokens: int = 0
    wait_s: float = 0.0
    prefill_s: float = 0.0
    query_s: float = 0.0
    decode_s: float = 0.0


@dataclass(frozen=True)
class Failed:
    """An answer that could not be completed."""

    error: ApiError


Event = Progress | Delta | Ended | Failed
# Takes a request's events, in any thread; it must not wait.
Listener = Callable[[Event], None]


class Ticket(Protocol):
    """A request that was taken.

    Attributes
    ----------
    cached_tokens : of the prompt, that were there already; known once the first token has come
    """

    @property
    def cached_tokens(self) -> int: ...

    def cancel(self) -> None:
        """End it at the next step. It gets no further events."""


class Backend(Protocol):
    """What HTTP needs of the engine's side. All methods may be called in any thread; those that tokenise take time.

    Attributes
    ----------
    model_name : as clients must give it
    created : when the server started, seconds since 1970
    tokenizer : the model's
    max_positions : tokens of prompt and answer together, None for no limit
    """

    model_name: str
    created: int
    tokenizer: Any
    max_positions: int | None

    def chat_prompt(self, messages: Sequence[Message]) -> Prompt:
        """Return a chat as ids, the answer opened; ApiError if it does not fit the template or the positions."""

    def text_prompt(self, text: str | Sequence[int]) -> Prompt:
        """Return a text, or ids, as a prompt; ApiError if it does not fit the positions."""

    def submit(self, prompt: Prompt, options: Options, listener: Listener) -> Ticket:
        """Take a request; ApiError if it does not fit, or the queue is full, or the server ends."""

    def health(self) -> dict[str, Any]:
        """Return what /health says: ``status`` is ``ok``, ``stopping`` or ``failed``."""
