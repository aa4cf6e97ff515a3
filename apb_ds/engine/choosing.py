"""How one sequence's next token is chosen, on the first rank: transformers' processors and criteria, and a streamer."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    StoppingCriteriaList,
)

from apb_ds.engine.generation_settings import arguments_for_loop


@dataclass(eq=False)
class Chooser:
    """Chooses one sequence's tokens on the first rank.

    Attributes
    ----------
    processors : LogitsProcessorList
    criteria : StoppingCriteriaList
    config : GenerationConfig
        All three as transformers' `generate` prepared them; see `prepare`.
    streamer : object with `put` and `end`, or None
    generator : torch.Generator or None
        Where sampling draws from, on the logits' device. None draws from torch's global one.
    """

    processors: Any
    criteria: StoppingCriteriaList
    config: GenerationConfig
    streamer: Any = None
    generator: torch.Generator | None = None
    _scores: Tensor | None = field(default=None, init=False, repr=False)

    @cached_property
    def is_plain(self) -> bool:
        """Whether the tokens are those of an argmax, until `max_length` tokens or one of `end_tokens`."""
        plain = (MaxLengthCriteria, EosTokenCriteria)
        return not self.config.do_sample and not self.processors and all(type(c) in plain for c in self.criteria)

    @cached_property
    def end_tokens(self) -> frozenset[int]:
        """The tokens after which the sequence ends."""
        found = [criterion.eos_token_id for criterion in self.criteria if isinstance(criterion, EosTokenCriteria)]
        return frozenset(token for tokens in found for token in tokens.tolist())

    @cached_property
    def max_length(self) -> int:
        """The tokens, of prompt and answer together, at which the sequence ends."""
        return min(criterion.max_length for criterion in self.criteria if isinstance(criterion, MaxLengthCriteria))

    def choose(self, input_ids: Tensor, logits: Tensor) -> Tensor:
        """Return the next token, (1, 1), int64.

        Parameters
        ----------
        input_ids : (1, tokens), int64, prompt and answer so far
        logits : (1, vocab), float32, of the last of them
        """
        self._scores = scores = self.processors(input_ids, logits)
        if self.config.do_sample:
            probabilities = torch.softmax(scores, dim=-1)
            return torch.multinomial(probabilities, num_samples=1, generator=self.generator)
        return scores.argmax(dim=-1, keepdim=True)

    def ends(self, input_ids: Tensor, scores: Tensor | None = None) -> bool:
        """Whether a criterion stops the sequence.

        Parameters
        ----------
        input_ids : (1, tokens), int64, with the newest token
        scores : (1, vocab), float32
            What the criteria get to see, by default the processed logits of the last `choose`.
        """
        return bool(self.criteria(input_ids, self._scores if scores is None else scores).all())

    def begin(self, input_ids: Tensor) -> None:
        """Tell the streamer the prompt, (1, tokens), as transformers does before the first token."""
        if self.streamer is not None:
            self.streamer.put(input_ids.cpu())

    def tell(self, token: Tensor) -> None:
        """Tell the streamer a new token, (1, 1)."""
        if self.streamer is not None:
            self.streamer.put(token.view(-1).cpu())

    def end(self) -> None:
        """Tell the streamer that no more tokens come."""
        if self.streamer is not None:
            self.streamer.end()


def prepare(
    model: PreTrainedModel, prompt_ids: Tensor, num_new: int, arguments: dict[str, Any], *, seed: int | None = None
) -> Chooser:
    """Let transformers' `generate` prepare a sequence's chooser; it runs no forward and may be called in any thread.

    Parameters
    ----------
    prompt_ids : (1, tokens), int64, on the logits' device
    num_new : tokens to generate at most
    arguments : of `generate`, as `check_generate_arguments` returns them
    seed : of a random generator for this sequence; None samples with torch's global one

    Raises
    ------
    ValueError
        For settings that `generate` refuses. A limit of time, `max_time`, counts from here.
    """
    generate: Any = model.generate
    arguments = arguments_for_loop(model, arguments)
    streamer = arguments.pop("streamer", None)
    processors, criteria, config = generate(
        input_ids=prompt_ids,
        attention_mask=torch.ones_like(prompt_ids),
        past_key_values=DynamicCache(),  # or it would make one for the model
        max_new_tokens=num_new,
        custom_generate=_capture,
        **arguments,
    )
    generator = None if seed is None else torch.Generator(device=prompt_ids.device).manual_seed(seed)
    return Chooser(processors, criteria, config, streamer, generator)


def _capture(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    **_: Any,
) -> tuple[LogitsProcessorList, StoppingCriteriaList, GenerationConfig]:
    """Stand in for a decoding loop: return what `generate` prepared for it."""
    return logits_processor, stopping_criteria, generation_config
