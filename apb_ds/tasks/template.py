"""The model's chat template: rendering a conversation, with a system prompt and arguments for the template."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from apb_ds.config import suggest
from apb_ds.tasks.control import mask
from apb_ds.utils.text import kind_and_line

# A text that no template contains: it marks where the template puts a message.
MARK = "\u2402user-text\u2403"
SOME_SYSTEM = "You are a helpful assistant."
LEAVE_OUT_SYSTEM = "leave out task.system and put instructions into the document"
# What `apply_chat_template` is given here anyway, or what is not for the template.
RESERVED = (
    *("conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "tokenizer_kwargs", "sanitize_control_tokens", "padding", "truncation", "max_length"),
    *("return_tensors", "return_dict", "return_assistant_tokens_mask"),
)


class TemplateRefusal(ValueError):
    """The chat template does not render a conversation."""


class ChatTokenizer:
    """A tokenizer whose chat template is given a system prompt and arguments; otherwise the tokenizer that it wraps.

    Attributes
    ----------
    wrapped : the tokenizer
    system : the system prompt, before every conversation; None for none
    arguments : further arguments of ``apply_chat_template``
    """

    def __init__(self, wrapped: Any, system: str | None, arguments: Mapping[str, Any], *, allow_special: bool = False):
        self.wrapped = wrapped
        self.system = system
        self.arguments = dict(arguments)
        text = system if system is None or allow_special else mask(wrapped, system)
        self._before = [] if text is None else [{"role": "system", "content": text}]

    def apply_chat_template(self, messages: list[dict[str, str]], **options: Any) -> Any:
        """Render a conversation, see transformers."""
        return self.wrapped.apply_chat_template([*self._before, *messages], **self.arguments, **options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.wrapped(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name == "wrapped":  # not set yet, while a copy is made
            raise AttributeError(name)
        return getattr(self.wrapped, name)


def with_template(
    tokenizer: Any, system: str | None, arguments: Mapping[str, Any] | None, *, allow_special: bool = False
) -> Any:
    """Return the tokenizer with a system prompt and arguments for its chat template; unchanged without either.

    Parameters
    ----------
    tokenizer : a transformers tokenizer, or None for a model without one
    system : the system prompt
    arguments : such as ``{"enable_thinking": False}``
    allow_special : whether control tokens written in the system prompt take effect

    Raises
    ------
    ValueError
        If the tokenizer has no chat template, or one that does not take these.
    """
    check_arguments(arguments or {})
    if system is None and not arguments:
        return tokenizer
    if not has_template(tokenizer):
        given = f"task.template={dict(arguments)}" if arguments else "task.system (in Python: system=)"
        raise ValueError(
            f"{given} needs a chat template, and this model comes without one; leave it out, put instructions into the "
            "document, or set model.tokenizer to a tokenizer that has one."
        )
    names = sorted({*re.findall(r"[A-Za-z_]\w*", _source(tokenizer))})
    for name in arguments or {}:
        if name not in names:
            raise ValueError(
                f"task.template.{name} has no effect: the tokenizer's chat template does not read {name!r}; leave it "
                f"out.{suggest(name, names)}"
            )
    if system is not None:
        trial = render(ChatTokenizer(tokenizer, MARK, arguments or {}), [user("a")], generation=False)
        if MARK not in trial:
            raise ValueError(f"task.system has no effect: the tokenizer's chat template omits it; {LEAVE_OUT_SYSTEM}.")
    return ChatTokenizer(tokenizer, system, arguments or {}, allow_special=allow_special)


def check_arguments(arguments: object) -> None:
    """Raise ValueError unless these can be arguments of a chat template."""
    if not isinstance(arguments, Mapping) or not all(isinstance(name, str) for name in arguments):
        raise ValueError(f"task.template={arguments!r} must be a mapping, such as {{enable_thinking: false}}.")
    for name in arguments:
        if name in RESERVED:
            raise ValueError(
                f"task.template.{name} is not an argument of the template itself; leave it out. Allowed is what the "
                "chat template reads, such as enable_thinking."
            )


def has_template(tokenizer: Any) -> bool:
    """Return whether the tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def user(text: str) -> dict[str, str]:
    """Return a user's message."""
    return {"role": "user", "content": text}


def render(tokenizer: Any, messages: list[dict[str, str]], *, generation: bool, continue_last: bool = False) -> str:
    """Return a conversation as the chat template writes it.

    Parameters
    ----------
    generation : whether the next answer is opened
    continue_last : whether the last message stays open

    Raises
    ------
    TemplateRefusal
        If the template refuses or fails, saying what would help.
    """
    options = {"tokenize": False, "add_generation_prompt": generation}
    if continue_last:
        options["continue_final_message"] = True
    try:
        return tokenizer.apply_chat_template(messages, **options)
    except MemoryError:
        raise
    except Exception as error:  # of any kind: a template is a program
        roles = ", ".join(message["role"] for message in messages)
        raise TemplateRefusal(
            f"the tokenizer's chat template cannot render a conversation of {roles} ({kind_and_line(error)}); "
            f"{_advice(tokenizer, messages, options)}."
        ) from error


def _advice(tokenizer: Any, messages: list[dict[str, str]], options: dict[str, bool]) -> str:
    """Return what to do about a conversation that the template does not render, by trying."""
    chat = tokenizer if isinstance(tokenizer, ChatTokenizer) else ChatTokenizer(tokenizer, None, {})
    remedies: list[tuple[str, str | None, dict[str, Any]]] = []
    if chat.system is None:
        needed = "it needs a system prompt: give one as task.system (in Python: system=)"
        remedies.append((needed, SOME_SYSTEM, chat.arguments))
    else:
        remedies.append((f"it takes no system prompt: {LEAVE_OUT_SYSTEM}", None, chat.arguments))
    if chat.arguments:
        remedies.append((f"correct task.template={chat.arguments}, without which it works", chat.system, {}))
    for advice, system, arguments in remedies:
        try:
            ChatTokenizer(chat.wrapped, system, arguments).apply_chat_template(messages, **options)
        except Exception:
            continue
        return advice
    return "set model.tokenizer to one whose template accepts it"


def _source(tokenizer: Any) -> str:
    """Return the text of the template, of all of them if the tokenizer has several."""
    template = tokenizer.chat_template
    return template if isinstance(template, str) else "\n".join(map(str, template.values()))
