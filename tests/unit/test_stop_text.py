"""Stop texts: the same tokens stop as with transformers' own criterion, whatever the tokenizer."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, StopStringCriteria

from apb_ds.engine.stop_text import StopText
from tests.unit.smollm2 import smollm2_tokenizer

FIRST = "<s>"
PIECES = ["<unk>", FIRST, "▁", *"abcdefop", *(f"▁{letter}" for letter in "abop"), "▁stop", "st", "ab", "▁▁", "é", "€"]
CHARACTERS = "é€😀a "
PASSAGE = "stop topper las peration, 42 the end.\n\nQ: ü€😀 naïve 日本語 “quoted”… <|im_end|>\nÀ:\t 🇩🇪  two  spaces"
LENGTH = 24


def _fast(backend: Tokenizer) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token=FIRST)


def byte_level() -> tuple[Any, list[list[int]]]:
    """SmolLM2's; the choices are the tokens of a passage, and the parts of its characters."""
    tokenizer = smollm2_tokenizer()
    ids = tokenizer(PASSAGE)["input_ids"]
    return tokenizer, [[token] for token in ids] + [[*tokenizer(character)["input_ids"]] for character in PASSAGE]


def byte_fallback() -> tuple[Any, list[list[int]]]:
    """As Llama 2's: bytes for unknown characters, and the first space stripped."""
    pieces = [*PIECES, *(f"<0x{byte:02X}>" for byte in range(256))]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    strip = decoders.Strip(" ", 1, 0)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), strip]  # type: ignore[list-item]
    )
    of_bytes = [[len(PIECES) + byte for byte in character.encode()] for character in CHARACTERS]
    return _fast(backend), [[i] for i in range(2, len(PIECES))] + 4 * of_bytes


def sentencepiece() -> tuple[Any, list[list[int]]]:
    backend = Tokenizer(models.Unigram([(piece, -float(i)) for i, piece in enumerate(PIECES)], 0))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return _fast(backend), [[i] for i in range(2, len(PIECES))]


def words() -> tuple[Any, list[list[int]]]:
    vocabulary = [FIRST, "<unk>", "abcdef", *"abc", "stop", "st", "op"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return _fast(backend), [[i] for i in range(2, len(vocabulary))]


def _cases(make: Any, rounds: int) -> Iterator[tuple[Any, list[str], list[list[int]]]]:
    """Yield a tokenizer, stop texts and sequences, in some of which the texts occur."""
    tokenizer, choices = make()
    drawn = random.Random(7)
    for _ in range(rounds):
        sequences = []
        for _ in range(20):
            parts = [[tokenizer.bos_token_id], *(drawn.choice(choices) for _ in range(LENGTH))]
            sequences.append([token for part in parts for token in part][:LENGTH])
        stops = []
        while not stops:
            for sequence in drawn.sample(sequences, 3):
                start = drawn.randrange(1, LENGTH - 5)
                text = tokenizer.decode(sequence[start : start + drawn.randrange(1, 6)]).strip("\ufffd")
                text = text[drawn.randrange(0, len(text) // 2 + 1) :][: drawn.randrange(1, 9)]
                stops += [text] if text and "\ufffd" not in text else []
        yield tokenizer, stops, sequences


@pytest.mark.parametrize(
    ("make", "rounds"),
    [(byte_level, 2), (byte_fallback, 25), (sentencepiece, 25), (words, 15)],
    ids=["byte_level", "byte_fallback", "sentencepiece", "words"],
)
def test_stops_where_transformers_does(make: Any, rounds: int) -> None:
    stopped = 0
    for tokenizer, stops, sequences in _cases(make, rounds):
        theirs, ours = StopStringCriteria(tokenizer, stops), StopText(tokenizer, stops)
        for length in range(2, LENGTH + 1):  # a first token's space is not in the text, but theirs counts it
            ids = torch.tensor([sequence[:length] for sequence in sequences])
            expected = theirs(ids, None)
            found = ours(ids, None)
            assert (found.dtype, found.shape) == (torch.bool, (len(sequences),))
            assert found.tolist() == expected.tolist(), (stops, length)
            stopped += int(found.sum())
    assert stopped > 20 * rounds


@functools.cache
def _fallback() -> Any:
    return byte_fallback()[0]


def _ids(text: str, as_bytes: str = "") -> list[int]:
    """Ids of the byte fallback's tokenizer: one for each character, several for those in `as_bytes`."""
    ids: list[int] = []
    for character in text:
        in_bytes = character in as_bytes or character not in PIECES
        ids += [len(PIECES) + byte for byte in character.encode()] if in_bytes else [PIECES.index(character)]
    return ids


def _stops(ids: list[int], *texts: str) -> bool:
    return bool(StopText(_fallback(), texts)(torch.tensor([ids]), None))


def test_a_text_may_begin_in_the_prompt_and_end_within_a_token() -> None:
    assert _stops(_ids("ab"), "ab")
    assert _stops([*_ids("ba"), PIECES.index("st")], "as")
    assert _stops([PIECES.index("▁stop"), PIECES.index("▁stop")], "op st")
    assert not _stops(_ids("abc"), "ab"), "completed by the token before"
    assert _stops(_ids("abc"), "x", "bc")


def test_a_character_in_several_tokens_counts_once_complete() -> None:
    ids = _ids("a😀😀b")
    found = [_stops(ids[:length], "😀") for length in range(1, len(ids) + 1)]
    assert found == [False, *[False, False, False, True] * 2, False]


def test_a_long_run_of_bytes_is_read_from_a_characters_beginning() -> None:
    """The decoder gives up a run of bytes that does not begin with a character's first."""
    ids = _ids(20 * "😀" + "😄")
    for more in range(4):
        assert _stops(_ids(more * "a" + "é", as_bytes="aé") + ids, "😄")
        assert not _stops(ids + _ids(more * "a" + "a", as_bytes="a"), "😀😄")


def test_a_text_that_was_there_before_the_last_character_does_not_stop() -> None:
    """While a character is incomplete, the run's other characters are unreadable, too."""
    assert _stops(_ids("ba€", as_bytes="€"), "a€")
    assert not _stops(_ids("ba€€", as_bytes="€"), "a€", "one that looks further back")
    assert _stops(_ids("ba€€", as_bytes="€"), "€")


def test_a_special_token_counts_as_its_text() -> None:
    assert _stops([*_ids("ab"), PIECES.index(FIRST)], FIRST)
