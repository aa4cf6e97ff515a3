"""Requests of OpenAI's API: what is honoured, what is accepted because ignoring it changes nothing, what is refused."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError

from apb_ds.config import is_number
from apb_ds.serving.errors import ApiError
from apb_ds.serving.requests import Message, Options
from apb_ds.tasks.jsonl import shortened

COMPLETION_TOKENS = 16  # OpenAI's default for completions
# Accepted: they do not change an answer.
IGNORED = ("user", "metadata", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention")
# Refused unless they have one of these values, which are as good as none.
ONLY: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "store": (False,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "response_format": ({"type": "text"},),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
    "moderation": (),
}


class _StopAtFirst(FailFast):
    """Only the first wrong item of a list is looked at: a body may have a million."""

    __hash__ = object.__hash__  # unions are sets of their members


Item = TypeVar("Item")
Items = Annotated[list[Item], _StopAtFirst()]
SHOWN_CHARACTERS = 60
SHOULD_BE = "Input should be "  # how pydantic begins what it says
_TOKEN = re.compile(r"[0-9]{1,18}")
_ALTERNATIVE = re.compile(r"str|\[key\]|list\[.*")  # pydantic's names of a union's members, between the parts of a path


class TextPart(BaseModel):
    """One part of a message's content."""

    model_config = ConfigDict(extra="forbid", strict=True)

    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """One message. It may have the empty fields of an answer, such as ``refusal``: clients send answers back."""

    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Items[TextPart] | None
    name: str | None = None

    @property
    def message(self) -> Message:
        texts = [self.content] if isinstance(self.content, str) else [part.text for part in self.content or []]
        return Message("system" if self.role == "developer" else self.role, tuple(texts))


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class _Request(BaseModel):
    """What both kinds of requests have."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Any] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | Items[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None

    def _options(self, **more: Any) -> Options:
        return Options(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=self._stops(),
            frequency_penalty=self.frequency_penalty or 0.0,
            presence_penalty=self.presence_penalty or 0.0,
            logit_bias=self._bias(),
            ignore_eos=bool(self.ignore_eos),
            **more,
        )

    def _stops(self) -> tuple[str, ...]:
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > 4 or not all(stops):
            raise _invalid("stop", "it must be up to 4 texts, none of them empty")
        return tuple(stops)

    def _bias(self) -> dict[int, float]:
        found = {}
        for token, bias in (self.logit_bias or {}).items():
            if not _TOKEN.fullmatch(token) or not is_number(bias) or not -100 <= bias <= 100:
                raise _invalid("logit_bias", "it must map token ids to numbers from -100 to 100")
            found[int(token)] = bias
        return found

    def check(self) -> None:
        """Refuse what does not go together."""
        if self.stream_options is not None and not self.stream:
            raise _invalid("stream_options", "it is only for stream=true")
        self._stops()
        self._bias()

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ChatRequest(_Request):
    """The body of /v1/chat/completions."""

    path: ClassVar[str] = "/v1/chat/completions"

    messages: Items[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise _invalid("top_logprobs", "it is only for logprobs=true")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise _invalid("max_tokens", "it differs from max_completion_tokens; give one of them")
        for index, one in enumerate(self.messages):
            said = sorted(name for name, value in (one.model_extra or {}).items() if value not in (None, [], {}))
            if said:
                raise _unknown(f"messages[{index}].{said[0]}")
            if one.content is None:
                raise _invalid(f"messages[{index}].content", f"{SHOULD_BE}a valid string, or a valid list")
            if not one.message.parts:
                raise _invalid(f"messages[{index}].content", "it has no parts")

    @property
    def options(self) -> Options:
        return self._options(
            max_new_tokens=self.max_completion_tokens or self.max_tokens,
            top_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
        )


class CompletionRequest(_Request):
    """The body of /v1/completions."""

    path: ClassVar[str] = "/v1/completions"

    prompt: str | Items[int] | Items[str] | Items[Items[int]]
    logprobs: int | None = Field(None, ge=0, le=5)

    def check(self) -> None:
        super().check()
        is_list = isinstance(self.prompt, list)
        if is_list and len(self.prompt) > 1 and not isinstance(self.prompt[0], int):
            raise _invalid("prompt", "it has several prompts; send each in its own request")

    @property
    def text(self) -> str | list[int]:
        """The prompt."""
        if isinstance(self.prompt, str):
            return self.prompt
        if self.prompt and isinstance(self.prompt[0], (str, list)):
            return self.prompt[0]
        return self.prompt  # type: ignore[return-value]

    @property
    def options(self) -> Options:
        return self._options(
            max_new_tokens=COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens,
            top_logprobs=self.logprobs,
            continues=True,
        )


Kind = TypeVar("Kind", ChatRequest, CompletionRequest)


def read_request(kind: type[Kind], values: Any) -> Kind:
    """Return a request of this kind from the JSON of its body.

    Raises
    ------
    ApiError
        That names the field at fault.
    """
    if not isinstance(values, dict):
        raise _refusal("The body must be a JSON object.", None)
    kept = {}
    for name, value in values.items():
        if name in IGNORED:
            continue
        if name in ONLY:
            if value is not None and value not in ONLY[name]:
                accepted = "".join(f", or give {json.dumps(one)}" for one in ONLY[name])
                why = f"{_shown(value)} is not supported by this server; leave it out{accepted}"
                raise _refusal(f"Invalid value for '{name}': {why}.", name, "unsupported_value")
            continue
        if name not in kind.model_fields:
            raise _unknown(name)
        kept[name] = value
    try:
        request = kind.model_validate(kept)
    except ValidationError as error:
        raise _as_refusal(error) from error
    request.check()
    return request


def _as_refusal(error: ValidationError) -> ApiError:
    """Return the innermost thing that is wrong, with its place."""
    problems = [(_field(one["loc"]), one) for one in error.errors(include_url=False, include_input=False)]
    field, first = max(problems, key=lambda one: len(one[1]["loc"]))  # the first one of those
    if first["type"] == "missing":
        return _refusal(f"Missing required parameter: '{field}'.", field, "missing_required_parameter")
    if first["type"] == "extra_forbidden":
        return _unknown(field)
    if first["type"] == "model_type":
        return _invalid(field, "it must be an object")
    reasons = dict.fromkeys(one["msg"] for other, one in problems if other == field)
    return _invalid(field, ", or ".join(reasons).replace(f", or {SHOULD_BE}", ", or "))


def _field(place: tuple[int | str, ...]) -> str:
    """Return a path such as ``messages[0].content``."""
    field = ""
    for part in place:
        if isinstance(part, int):
            field += f"[{part}]"
        elif not _ALTERNATIVE.fullmatch(part):
            field += f".{shortened(part, SHOWN_CHARACTERS)}" if field else part
    return field


def _invalid(field: str, why: str) -> ApiError:
    return _refusal(f"Invalid value for '{field}': {why}.", field, "invalid_value")


def _unknown(name: str) -> ApiError:
    name = shortened(name, SHOWN_CHARACTERS)
    return _refusal(f"Unrecognized request argument supplied: {name}", name, "unknown_parameter")


def _refusal(message: str, param: str | None, code: str | None = None) -> ApiError:
    return ApiError(400, message, param=param, code=code)


def _shown(value: Any) -> str:
    """Return the beginning of a value as JSON; it may be as large as a body, and as deep."""
    text = ""
    for piece in json.JSONEncoder(ensure_ascii=False).iterencode(value):
        text += piece
        if len(text) > SHOWN_CHARACTERS:
            break
    return shortened(text, SHOWN_CHARACTERS)
