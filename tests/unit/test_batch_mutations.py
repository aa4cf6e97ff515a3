"""The schedules notice faults: with one fault in packs, suffixes or choosing, some answer is not the plain model's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import apb_ds
from apb_ds import suffixes
from apb_ds.engine import batch, packs
from apb_ds.engine.choosing import Chooser
from apb_ds.methods import packed
from apb_ds.methods.packed import LayerStates, Member, Pack
from apb_ds.suffixes import KeysAndValues, Prefix, Slab, Suffix, SuffixPool
from tests.models import build_model
from tests.schedules import EXACT, FULL_SCHEDULE, WrongAnswer, play, schedule_model, small_sizes

Patch = pytest.MonkeyPatch


def _change_table(patch: Patch, change: Callable[[list[list[int]]], Any]) -> None:
    """Change the slots, numbers of keys and places of a step's rows."""
    original = packed._table

    def changed(*args: Any) -> list[list[int]]:
        table = original(*args)
        change(table)
        return table

    patch.setattr(packed, "_table", changed)


def _set_row(table: list[list[int]], row: int, values: Sequence[int]) -> None:
    table[row] = [*values]


def last_new_token_of_each_query_lost(patch: Patch) -> None:
    original = packed.Alike.__init__

    def shorter(self: Any, spans: Sequence[slice], device: torch.device) -> None:
        original(self, spans, device)
        self._kept = (self._kept - 1).clamp_min(0)

    patch.setattr(packed.Alike, "__init__", shorter)


def queries_of_a_call_mixed_up(patch: Patch) -> None:
    original = packed.Alike.padded
    patch.setattr(packed.Alike, "padded", lambda self, states: original(self, states).roll(1, 2))


def newest_key_of_a_slot_unseen(patch: Patch) -> None:
    _change_table(patch, lambda table: _set_row(table, 1, [max(0, count - 1) for count in table[1]]))


def one_key_of_a_slot_too_many(patch: Patch) -> None:
    _change_table(patch, lambda table: _set_row(table, 1, [count + 1 for count in table[1]]))


def slots_of_others_read(patch: Patch) -> None:
    _change_table(patch, lambda table: _set_row(table, 0, table[0][1:] + table[0][:1]))


def tokens_written_to_others_slots(patch: Patch) -> None:
    _change_table(patch, lambda table: _set_row(table, 2, table[2][1:] + table[2][:1]))


def tokens_written_one_place_on(patch: Patch) -> None:
    _change_table(patch, lambda table: _set_row(table, 2, [place + 1 for place in table[2]]))


def _shift_reach(patch: Patch, by: int) -> None:
    original = packed._reach
    patch.setattr(packed, "_reach", lambda *args: [max(0, reach + by) for reach in original(*args)])


def window_reaches_one_document_token_less(patch: Patch) -> None:
    _shift_reach(patch, -1)


def window_forgets_that_the_suffix_grows(patch: Patch) -> None:
    patch.setattr(packed, "_reach", lambda members, window: [window - 1 for _ in members])


def window_of_queries_one_wider(patch: Patch) -> None:
    original = packed._attend_window

    def wider(tools: Any, pack: Any, states: Any, query: Tensor, window: int) -> Tensor | Any:
        return original(tools, pack, states, query, window + 1)

    patch.setattr(packed, "_attend_window", wider)


def window_within_slots_one_wider(patch: Patch) -> None:
    original = packed._attend_slots

    def changed(tools: Any, pack: Any, states: Any, query: Tensor, window: int | None = None) -> Any:
        kernel = tools.kernels.decode

        def attend(*args: Any, window: int | None, **options: Any) -> Any:
            return kernel.attend_slots(*args, window=None if window is None else window + 1, **options)

        kernels: Any = SimpleNamespace(decode=SimpleNamespace(attend_slots=attend), recorded=None)
        return original(replace(tools, kernels=kernels), pack, states, query, window)

    patch.setattr(packed, "_attend_slots", changed)


def _change_prefix(patch: Patch, change: Callable[[KeysAndValues], KeysAndValues]) -> None:
    original = Prefix.states

    def states(self: Prefix, layer_idx: int) -> KeysAndValues | None:
        found = original(self, layer_idx)
        return None if found is None else change(found)

    patch.setattr(Prefix, "states", states)


def last_document_token_unseen(patch: Patch) -> None:
    _change_prefix(patch, lambda states: (states[0][:, :, :-1], states[1][:, :, :-1]))


def first_document_token_unseen(patch: Patch) -> None:
    _change_prefix(patch, lambda states: (states[0][:, :, 1:], states[1][:, :, 1:]))


def documents_mixed_up(patch: Patch) -> None:
    init = Pack.__init__

    def mixed(self: Pack, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        prefixes = [prefix for prefix, _ in self.groups]
        spans = [span for _, span in self.groups]
        self.groups = list(zip(prefixes[1:] + prefixes[:1], spans, strict=True))

    patch.setattr(Pack, "__init__", mixed)


def a_prefix_moves_with_its_context(patch: Patch) -> None:
    """As if the end of a document, which layers with windows keep, were not copied."""

    class Never:
        pass

    patch.setattr(suffixes, "WindowCacheLayer", Never)


def positions_off_by_one(patch: Patch) -> None:
    positions: Any = Member.positions.fget  # type: ignore[attr-defined]

    def shifted(self: Member) -> range:
        found = positions(self)
        return range(found.start + 1, found.stop + 1)

    patch.setattr(Member, "positions", property(shifted))


def one_rotary_reach_for_all(patch: Patch) -> None:
    original = packs.packed_attention

    def shared(model: Any, attention: Any, pack: Any, reaches: Any) -> Any:
        longest = max(reach for _, reach in reaches)
        return original(model, attention, pack, [(length, longest) for length, _ in reaches])

    patch.setattr(packs, "packed_attention", shared)


def query_sees_its_later_tokens(patch: Patch) -> None:
    original = packed._attend_suffixes

    def changed(tools: Any, *args: Any) -> Any:
        kernel = tools.kernels.prefill

        def attend(query: Tensor, keys: Tensor, values: Tensor, causal: bool, scale: float, **options: Any) -> Any:
            return kernel(query, keys, values, False, scale, **options)

        return original(replace(tools, kernels=SimpleNamespace(prefill=attend, decode=attend)), *args)

    patch.setattr(packed, "_attend_suffixes", changed)


def query_forgets_earlier_turns(patch: Patch) -> None:
    patch.setattr(LayerStates, "past", lambda self, index: None)


def parts_merged_without_lse(patch: Patch) -> None:
    def average(_: Any, first: Any, second: Any) -> Any:
        return (first[0] + second[0]) / 2, torch.logaddexp(first[1], second[1])

    patch.setattr(packed, "_merged", average)


def a_moved_suffix_is_left_behind(patch: Patch) -> None:
    def forgetting(self: SuffixPool, window: int | None, source: Any, target: Any) -> None:
        target.length = source.length

    patch.setattr(SuffixPool, "_copy", forgetting)


def a_grown_slab_is_empty(patch: Patch) -> None:
    grow = Slab._grow

    def emptied(self: Slab, num_slots: int) -> None:
        grow(self, num_slots)
        for pair in self._buffers.values():
            for states in pair:
                states.zero_()

    patch.setattr(Slab, "_grow", emptied)


def a_slot_is_given_twice(patch: Patch) -> None:
    def take(self: Slab) -> int:
        if not self._free and self.num_slots == 0:
            self._grow(2)
        return 0

    patch.setattr(Slab, "take", take)
    patch.setattr(Slab, "free", lambda self, slot: None)


def a_window_forgets_one_token_too_many(patch: Patch) -> None:
    original = suffixes._forget_unreachable
    patch.setattr(suffixes, "_forget_unreachable", lambda place, window: original(place, window - 1))


def logits_given_to_the_next_sequence(patch: Patch) -> None:
    original = batch.run_pack
    patch.setattr(batch, "run_pack", lambda *args: original(*args).roll(1, dims=0))


def sequences_share_a_generator(patch: Patch) -> None:
    original = batch.prepare
    shared = torch.Generator().manual_seed(0)

    def prepared(*args: Any, seed: int | None, **options: Any) -> Any:
        chooser = original(*args, seed=seed, **options)
        if seed is not None:
            chooser.generator = shared
        return chooser

    patch.setattr(batch, "prepare", prepared)


def end_tokens_of_plain_sequences_ignored(patch: Patch) -> None:
    patch.setattr(Chooser, "end_tokens", frozenset())


def end_tokens_of_others_ignored(patch: Patch) -> None:
    original = Chooser.ends
    patch.setattr(Chooser, "ends", lambda self, ids, scores=None: original(self, ids * 0 - 1, scores))


FAULTS = [
    last_new_token_of_each_query_lost,
    queries_of_a_call_mixed_up,
    newest_key_of_a_slot_unseen,
    one_key_of_a_slot_too_many,
    slots_of_others_read,
    tokens_written_to_others_slots,
    tokens_written_one_place_on,
    window_reaches_one_document_token_less,
    window_forgets_that_the_suffix_grows,
    window_of_queries_one_wider,
    window_within_slots_one_wider,
    last_document_token_unseen,
    first_document_token_unseen,
    documents_mixed_up,
    a_prefix_moves_with_its_context,
    positions_off_by_one,
    one_rotary_reach_for_all,
    query_sees_its_later_tokens,
    query_forgets_earlier_turns,
    parts_merged_without_lse,
    a_moved_suffix_is_left_behind,
    a_grown_slab_is_empty,
    a_slot_is_given_twice,
    a_window_forgets_one_token_too_many,
    logits_given_to_the_next_sequence,
    sequences_share_a_generator,
    end_tokens_of_plain_sequences_ignored,
    end_tokens_of_others_ignored,
]


@pytest.fixture(scope="module")
def engine() -> Any:
    return apb_ds.init_inference(schedule_model(), apb_ds.APBConfig(**EXACT))


@pytest.fixture(scope="module")
def judge() -> Any:
    return schedule_model()


@pytest.fixture
def sizes() -> Iterator[Patch]:
    with small_sizes() as patch:
        yield patch


def test_without_a_fault(engine: Any, judge: Any, sizes: Patch) -> None:
    play(engine, judge, FULL_SCHEDULE)


def copied_documents_lack_their_last_token(patch: Patch) -> None:
    original = SuffixPool._copy_document

    def shorter(self: SuffixPool, window: int | None, prefix: Prefix, target: Any) -> None:
        original(self, window, prefix, target)
        target.length -= 1

    patch.setattr(SuffixPool, "_copy_document", shorter)


def copied_documents_are_not_counted(patch: Patch) -> None:
    original = SuffixPool.new

    def uncounted(self: SuffixPool, forwards: Any, source: Any = None, document: Any = None) -> Suffix:
        suffix = original(self, forwards, source, document)
        if document is not None:
            suffix.num_tokens = 0
        return suffix

    patch.setattr(SuffixPool, "new", uncounted)


def copied_documents_are_seen_twice(patch: Patch) -> None:
    original = batch.Batch._sequence

    def with_prefix(self: Any, handle: Any) -> Any:
        sequence = original(self, handle)
        if handle.copies_document:
            sequence.suffix.num_tokens = 0
            sequence.prefix = handle.request.source.prefix()
        return sequence

    patch.setattr(batch.Batch, "_sequence", with_prefix)


@pytest.mark.parametrize(
    "fault",
    [
        None,
        copied_documents_lack_their_last_token,
        copied_documents_are_not_counted,
        copied_documents_are_seen_twice,
    ],
)
def test_documents_that_are_copied(
    engine: Any, judge: Any, sizes: Patch, fault: Callable[[Patch], None] | None
) -> None:
    if fault is None:
        scene = play(engine, judge, FULL_SCHEDULE, copies=True)
        assert sum(one.handle.copies_document for one in scene.asked) > 1
        return
    fault(sizes)
    with pytest.raises(WrongAnswer):
        play(engine, judge, FULL_SCHEDULE, copies=True)


@pytest.mark.parametrize("fault", FAULTS, ids=[fault.__name__ for fault in FAULTS])
def test_a_fault_is_noticed(engine: Any, judge: Any, sizes: Patch, fault: Callable[[Patch], None]) -> None:
    fault(sizes)
    engine.pool = SuffixPool(engine.layers, 0, 1, engine.device)  # the fault may have spoilt the last one
    with pytest.raises(WrongAnswer):
        play(engine, judge, FULL_SCHEDULE)


def newest_token_not_expanded(patch: Patch) -> None:
    original = Pack._suffix
    patch.setattr(
        Pack,
        "_suffix",
        lambda self, layer_idx, index, keys, values: original(self, layer_idx, index, keys.roll(1, 2), values),
    )


@pytest.mark.parametrize("fault", [None, last_document_token_unseen, newest_token_not_expanded])
def test_layers_that_expand_what_they_cache(sizes: Patch, fault: Callable[[Patch], None] | None) -> None:
    engine = apb_ds.init_inference(build_model("deepseek_v3"), apb_ds.APBConfig(**EXACT))
    judge = build_model("deepseek_v3")
    if fault is None:
        play(engine, judge, FULL_SCHEDULE)
        return
    fault(sizes)
    with pytest.raises(WrongAnswer):
        play(engine, judge, FULL_SCHEDULE)
