"""Exact attention in a pack: new tokens of many sequences in one forward, each over its own document and suffix.

All queries about one document attend to this rank's shard of it in one kernel call, without a mask; each sequence
attends to its own suffix. The two parts are merged by their log-sum-exps, then the ranks' results. Layers with a window
do the same with the end of the document, whose tokens every rank has, and need no other rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain, groupby, pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from apb_ds.methods.decode import merge_ranks, saw_nothing
from apb_ds.methods.state import Part, Tools
from apb_ds.suffixes import KeysAndValues, Prefix, Slab, Suffix, SuffixPool
from apb_ds.utils.sizes import LayerAttention


class Member:
    """A sequence, as a pack sees it.

    Attributes
    ----------
    prefix, suffix : where its tokens so far are stored
    fed : its new tokens
    reach : positions that its rotary frequencies are chosen for
    """

    def __init__(self, prefix: Prefix, suffix: Suffix, fed: list[int], reach: int) -> None:
        self.prefix = prefix
        self.suffix = suffix
        self.fed = fed
        self.reach = reach

    @property
    def positions(self) -> range:
        """Positions of the new tokens."""
        first = self.prefix.num_tokens + self.suffix.num_tokens
        return range(first, first + len(self.fed))


@dataclass
class SlabRows:
    """The rows of a step that are stored in one slab.

    Attributes
    ----------
    rows : indices into the pack
    index : the same on the device, to select them; None for all in order
    span : where their numbers lie in the step's
    slots : (rows,), int32, on the device
    num_keys : (rows,), int32, on the device: how many keys of its slot a row sees
    written : (rows,), int64, on the device: where its keys and values go, slot times capacity plus place
    """

    slab: Slab
    rows: list[int]
    index: Tensor | None
    span: slice
    slots: Tensor = field(init=False)
    num_keys: Tensor = field(init=False)
    written: Tensor = field(init=False)

    def read(self, numbers: Tensor) -> None:
        """Take what is theirs of a step's numbers."""
        slots, num_keys, self.written = numbers[self.span].view(3, -1)
        self.slots, self.num_keys = slots.int(), num_keys.int()


class Alike:
    """Sequences of a pack whose new tokens this rank stores, of similar number: one call attends to them all.

    Parameters
    ----------
    spans : where each one's new tokens lie in the pack

    Attributes
    ----------
    tokens : (tokens,), int64, on the device: all of their tokens, without padding
    """

    def __init__(self, spans: Sequence[slice], device: torch.device) -> None:
        self._number = len(spans)
        longest = max(span.stop - span.start for span in spans)
        # Shorter queries are padded with their last token: it comes after their own tokens, so none of them sees it.
        taken = [min(span.start + place, span.stop - 1) for span in spans for place in range(longest)]
        kept = [number * longest + at for number, span in enumerate(spans) for at in range(span.stop - span.start)]
        tokens = [token for span in spans for token in range(span.start, span.stop)]
        self._taken, self._kept, self.tokens = (
            torch.tensor(numbers).to(device, non_blocking=True) for numbers in (taken, kept, tokens)
        )

    def padded(self, states: Tensor) -> Tensor:
        """Return (sequences, heads, longest, channels) of (1, heads, all tokens, channels)."""
        taken = states[0].index_select(1, self._taken)
        return taken.unflatten(1, (self._number, -1)).transpose(0, 1)

    def without_padding(self, part: Tensor) -> Tensor:
        """Return (1, heads, tokens, ...) of (sequences, heads, longest, ...)."""
        return part.transpose(0, 1).flatten(1, 2).index_select(1, self._kept).unsqueeze(0)


class Pack:
    """The new tokens of some sequences, those of one prefix next to each other.

    Room for the new tokens must have been made.

    Parameters
    ----------
    layers : how each layer attends
    pool : of the suffixes
    members : sequences, ordered by prefix
    device : where the model's tensors are

    Attributes
    ----------
    inputs : (2, tokens), int64, on the device: ids and positions
    alike : the sequences whose new tokens this rank stores, by how many tokens they have; not in a step
    """

    def __init__(
        self, layers: Sequence[LayerAttention], pool: SuffixPool, members: Sequence[Member], device: torch.device
    ) -> None:
        self.layers = layers
        self.members = list(members)
        self._rank = pool.rank
        bounds = [0, *accumulate(len(member.fed) for member in members)]
        self.spans = [slice(start, stop) for start, stop in pairwise(bounds)]
        self.groups: list[tuple[Prefix, slice]] = []
        for _, numbered in groupby(enumerate(members), key=lambda pair: id(pair[1].prefix)):
            indices = [index for index, _ in numbered]
            span = slice(self.spans[indices[0]].start, self.spans[indices[-1]].stop)
            self.groups.append((members[indices[0]].prefix, span))
        self.is_step = all(len(member.fed) == 1 for member in members)
        self._are_shared = not all(layer.stores for layer in layers)
        self._given: dict[int, KeysAndValues] = {}  # what each layer stored, of the new tokens
        self._sources: dict[int, int] = {}  # layers by the address of what `store` returned
        self._spans: dict[int, tuple[list[slice], list[slice]]] = {}  # of prefixes and suffixes, in expanded layers
        self.slab_rows: dict[int | None, list[SlabRows]] = {}
        self.num_last: dict[int, Tensor] = {}  # by window: (rows,), int32, of its prefix's last tokens that a row sees
        self._last_spans: dict[int, slice] = {}
        if self.is_step:
            self._place_rows(device)
        else:
            ids = [token for member in members for token in member.fed]
            positions = [position for member in members for position in member.positions]
            self.inputs = torch.tensor([ids, positions]).to(device, non_blocking=True)
            by_size: dict[int, list[slice]] = {}  # lengths within a factor of two, so that at most half is padding
            for index, span in enumerate(self.spans):
                if self.stores(index):
                    by_size.setdefault((span.stop - span.start - 1).bit_length(), []).append(span)
            self.alike = [Alike(spans, device) for spans in by_size.values()]

    def _place_rows(self, device: torch.device) -> None:
        """Say where each row's new token goes, and which keys it sees."""
        num_rows = len(self.members)
        stop = 2 * num_rows
        for window in self.members[0].suffix.places:
            by_slab: dict[int, list[int]] = {}
            for row, member in enumerate(self.members):
                by_slab.setdefault(id(member.suffix.places[window].slab), []).append(row)
            for rows in by_slab.values():
                slab = self.members[rows[0]].suffix.places[window].slab
                index = None if len(rows) == num_rows else torch.tensor(rows, device=device)
                start, stop = stop, stop + 3 * len(rows)
                self.slab_rows.setdefault(window, []).append(SlabRows(slab, rows, index, slice(start, stop)))
            if window is not None:
                start, stop = stop, stop + num_rows
                self._last_spans[window] = slice(start, stop)
        # All that differs between two steps, in one copy.
        self._on_host = torch.empty(stop, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._numbers = torch.empty(stop, dtype=torch.int64, device=device)
        self.inputs = self._numbers[: 2 * num_rows].view(2, -1)
        self.replace(self.members)

    def replace(self, members: Sequence[Member]) -> None:
        """Put other members in the places of those of a step, each in the same slabs and after the same prefix.

        The last step must have ended: what was copied for it is overwritten.
        """
        numbers = [member.fed[0] for member in members]
        numbers += [member.prefix.num_tokens + member.suffix.num_tokens for member in members]
        for window, found in self.slab_rows.items():
            for rows in found:
                numbers += chain.from_iterable(_table(members, rows.rows, window, self._rank))
            if window is not None:
                numbers += _reach(members, window)
        self._on_host.copy_(torch.tensor(numbers))
        self._numbers.copy_(self._on_host, non_blocking=True)

    def read_numbers(self) -> None:
        """Take what differs between steps from where `replace` put it. A recorded step does so each time."""
        for found in self.slab_rows.values():
            for rows in found:
                rows.read(self._numbers)
        self.num_last = {window: self._numbers[span].int() for window, span in self._last_spans.items()}

    def release(self) -> None:
        """Let go of the sequences, their documents and slabs; only `replace` may follow."""
        self.members, self.groups = [], []
        for found in self.slab_rows.values():
            for rows in found:
                del rows.slab

    def store(self, layer_idx: int, keys: Tensor, values: Tensor) -> KeysAndValues:
        """Store what a layer caches of the new tokens; return what it is to hand on to its attention.

        Parameters
        ----------
        keys, values : (1, kv_heads, tokens, channels)

        Returns
        -------
        The same; in a layer that expands what it caches, all that this rank has of prefixes and suffixes (one token of
        zeros if that is nothing, since models cannot expand an empty tensor).
        """
        layer = self.layers[layer_idx]
        self._given[layer_idx] = keys, values
        returned = keys, values
        if not layer.stores_attended:
            returned = self._everything(layer_idx, keys, values)
        self._sources[returned[0].data_ptr()] = layer_idx
        for slab, index, written in self._written(layer.window, keys.device):
            for buffer, states in zip(slab.buffers(layer_idx), (keys, values), strict=True):
                tokens = states[0].transpose(0, 1)
                tokens = tokens if index is None else tokens[index]
                buffer.view(-1, *buffer.shape[2:]).index_copy_(0, written, tokens)
        return returned

    def _written(self, window: int | None, device: torch.device) -> Iterator[tuple[Slab, Tensor | None, Tensor]]:
        """Yield slab, which of the new tokens, and where they go."""
        if self.is_step:
            for rows in self.slab_rows[window]:
                yield rows.slab, rows.index, rows.written
            return
        for member, span in zip(self.members, self.spans, strict=True):
            place = member.suffix.places[window]
            if window is not None or member.suffix.owner == self._rank:
                start = place.slot * place.slab.capacity + place.length
                tokens = torch.arange(span.start, span.stop, device=device)
                yield place.slab, tokens, tokens + (start - span.start)

    def _everything(self, layer_idx: int, keys: Tensor, values: Tensor) -> KeysAndValues:
        of_prefixes = [prefix.states(layer_idx) for prefix, _ in self.groups]
        of_suffixes = [self._suffix(layer_idx, index, keys, values) for index in range(len(self.members))]
        nothing = keys[:, :, :0], values[:, :, :0]
        parts = [part or nothing for part in (*of_prefixes, *of_suffixes)]
        bounds = [0, *accumulate(part[0].shape[2] for part in parts)]
        spans = [slice(start, stop) for start, stop in pairwise(bounds)]
        self._spans[layer_idx] = spans[: len(of_prefixes)], spans[len(of_prefixes) :]
        if bounds[-1] == 0:
            return torch.zeros_like(keys[:, :, :1]), torch.zeros_like(values[:, :, :1])
        all_keys, all_values = (torch.cat(states, dim=2) for states in zip(*parts, strict=True))
        return all_keys, all_values

    def _suffix(self, layer_idx: int, index: int, keys: Tensor, values: Tensor) -> KeysAndValues | None:
        """Return what this rank has of a sequence's suffix, with the new tokens if it stores them."""
        parts = [part for part in (self.past(layer_idx, index), self._new(index, keys, values)) if part is not None]
        if not parts:
            return None
        all_keys, all_values = (torch.cat(states, dim=2) for states in zip(*parts, strict=True))
        return all_keys, all_values

    def past(self, layer_idx: int, index: int) -> KeysAndValues | None:
        """Return what this rank has of a sequence's suffix before this forward, (1, kv_heads, tokens, channels)."""
        place = self.members[index].suffix.places[self.layers[layer_idx].window]
        if place.length == 0:
            return None
        keys, values = (
            states[place.slot, : place.length].transpose(0, 1).unsqueeze(0) for states in place.slab.buffers(layer_idx)
        )
        return keys, values

    def stores(self, index: int) -> bool:
        """Whether this rank stores a sequence's new tokens in layers without a window."""
        return self.members[index].suffix.owner == self._rank

    def _new(self, index: int, keys: Tensor, values: Tensor) -> KeysAndValues | None:
        span = self.spans[index]
        return (keys[:, :, span], values[:, :, span]) if self.stores(index) else None

    def states(self, layer_idx: int, keys: Tensor, values: Tensor) -> LayerStates:
        """Return what a layer attends to.

        Parameters
        ----------
        keys, values : that its attention got
        """
        source = layer_idx if self.layers[layer_idx].stores else self._sources[keys.data_ptr()]
        given = self._given[source] if self._are_shared else self._given.pop(source)
        if source in self._spans:
            return LayerStates(self, source, (keys, values), self._spans[source])
        return LayerStates(self, source, given)


def _table(members: Sequence[Member], rows: Sequence[int], window: int | None, rank: int) -> list[list[int]]:
    """Return what `SlabRows.read` reads."""
    slots, num_keys, written = [], [], []
    for row in rows:
        suffix = members[row].suffix
        place = suffix.places[window]
        stores = window is not None or suffix.owner == rank
        slots.append(place.slot)
        num_keys.append(place.length + stores)
        slot, start = (place.slot, place.length) if stores else (place.slab.scratch, 0)
        written.append(slot * place.slab.capacity + start)
    return [slots, num_keys, written]


def _reach(members: Sequence[Member], window: int) -> list[int]:
    """Return how many of the last tokens of its prefix each new token sees within a window."""
    return [max(0, window - 1 - member.suffix.num_tokens) for member in members]


class LayerStates:
    """What a layer of a pack attends to on this rank. All keys and values are (1, kv_heads, tokens, channels).

    Parameters
    ----------
    source : the layer whose cache it is
    given : keys and values of the new tokens, or all of them expanded
    spans : where prefixes and suffixes lie in what was expanded
    """

    def __init__(
        self,
        pack: Pack,
        source: int,
        given: KeysAndValues,
        spans: tuple[list[slice], list[slice]] | None = None,
    ) -> None:
        self._pack = pack
        self.source = source
        self._given = given
        self._expanded = spans

    @property
    def in_slots(self) -> bool:
        """Whether suffixes can be attended to where they are stored."""
        return self._expanded is None

    def prefix(self, group: int) -> KeysAndValues | None:
        """Return what this rank has of a prefix."""
        if self._expanded is None:
            return self._pack.groups[group][0].states(self.source)
        return self._of(self._expanded[0][group])

    def past(self, index: int) -> KeysAndValues | None:
        """Return what this rank has of a sequence's suffix before this forward."""
        if self._expanded is None:
            return self._pack.past(self.source, index)
        span = self._expanded[1][index]
        num_new = len(self._pack.members[index].fed) if self._pack.stores(index) else 0
        return self._of(slice(span.start, span.stop - num_new))

    def new(self, index: int) -> KeysAndValues:
        """Return the new tokens of a sequence; of an expanded layer on the rank that stores them only."""
        keys, values = self._given
        if self._expanded is None:
            span = self._pack.spans[index]
        else:
            end = self._expanded[1][index].stop
            span = slice(end - len(self._pack.members[index].fed), end)
        return keys[:, :, span], values[:, :, span]

    @property
    def all_new(self) -> KeysAndValues:
        """The new tokens of all sequences; not of an expanded layer."""
        return self._given

    def _of(self, span: slice) -> KeysAndValues | None:
        keys, values = self._given
        return (keys[:, :, span], values[:, :, span]) if span.stop > span.start else None


def attend(
    tools: Tools, pack: Pack, layer_idx: int, query: Tensor, keys: Tensor, values: Tensor, window: int | None
) -> Tensor:
    """Attend for the new tokens of all sequences of a pack.

    Parameters
    ----------
    query : (1, heads, tokens, head_dim), the same on every rank
    keys, values : (1, kv_heads, tokens, channels), what the model handed on of what `Pack.store` returned

    Returns
    -------
    (1, heads, tokens, value_dim) in ``query.dtype``, the same on every rank
    """
    states = pack.states(layer_idx, keys, values)
    if window is not None:
        attend_window = _attend_window_in_slots if pack.is_step and states.in_slots else _attend_window
        return tools.with_sinks(attend_window(tools, pack, states, query, window))[0]
    attend_suffixes = _attend_slots if pack.is_step and states.in_slots else _attend_suffixes
    part = attend_suffixes(tools, pack, states, query)
    documents = _attend_documents(tools, pack, states, query)
    if documents is not None and tools.group.world_size == 1 and tools.sinks is None:
        return tools.merge_two(*documents, *part)
    if documents is not None:
        part = _merged(tools, documents, part)
    if tools.group.is_last:
        part = tools.with_sinks(part)
    return merge_ranks(tools, *part)


def _attend_documents(tools: Tools, pack: Pack, states: LayerStates, query: Tensor) -> Part | None:
    """Attend to this rank's shards; None if it has none of any document."""
    shards = [states.prefix(group) for group in range(len(pack.groups))]
    if all(shard is None for shard in shards):
        return None
    parts = []
    for (_, span), shard in zip(pack.groups, shards, strict=True):
        rows = query[:, :, span]
        if shard is None:
            parts.append(saw_nothing(rows))
            continue
        keys, values = _widened(shard, query)
        if pack.is_step:  # one read of the keys serves all heads of a group, and all sequences
            kernel = tools.kernels.recorded or tools.kernels.decode
            parts.append(kernel.attend_all(rows, keys, values, tools.scale, softcap=tools.softcap))
        else:
            parts.append(tools.attend(rows, keys, values))
    return _joined(parts)


def _attend_slots(tools: Tools, pack: Pack, states: LayerStates, query: Tensor, window: int | None = None) -> Part:
    """Attend to suffixes for one new token each, where they are stored."""
    kernel = tools.kernels.recorded or tools.kernels.decode
    rows_first = query[0].transpose(0, 1).unsqueeze(2)  # (rows, heads, 1, head_dim)
    found = pack.slab_rows[window]
    parts = []
    for rows in found:
        keys, values = (buffer.transpose(1, 2) for buffer in rows.slab.buffers(states.source))
        keys, values = _widened((keys, values), query)
        mine = rows_first if rows.index is None else rows_first[rows.index]
        parts.append(
            kernel.attend_slots(
                mine,
                keys,
                values,
                rows.slots,
                rows.num_keys,
                tools.scale,
                window=window,
                softcap=tools.softcap,
                have_keys=window is not None or tools.group.world_size == 1,  # at least the new token itself
            )
        )
    output, lse = parts[0]
    if len(parts) > 1:
        order = torch.cat([rows.index for rows in found if rows.index is not None]).argsort()
        output, lse = (torch.cat(states)[order] for states in zip(*parts, strict=True))
    return output.squeeze(2).transpose(0, 1).unsqueeze(0), lse.squeeze(2).transpose(0, 1).unsqueeze(0)


def _attend_suffixes(tools: Tools, pack: Pack, states: LayerStates, query: Tensor) -> Part:
    """Attend to suffixes for any number of new tokens: to earlier tokens by sequence, to new ones in few calls."""
    if not states.in_slots or tools.softcap is not None:  # with which not all kernels take several
        return _attend_suffixes_in_turn(tools, pack, states, query)
    keys, values = _widened(states.all_new, query)
    output, lse = saw_nothing(query)
    for alike in pack.alike:
        rows, k, v = (alike.padded(of) for of in (query, keys, values))
        found = tools.kernels.prefill(rows, k, v, rows.shape[2] > 1, tools.scale, softcap=tools.softcap)
        for all_tokens, part in zip((output, lse), found, strict=True):
            all_tokens.index_copy_(2, alike.tokens, alike.without_padding(part))
    for index, span in enumerate(pack.spans):
        if (past := states.past(index)) is not None:
            seen = tools.attend(query[:, :, span], *_widened(past, query))
            if pack.stores(index):
                seen = _merged(tools, seen, (output[:, :, span], lse[:, :, span]))
            output[:, :, span], lse[:, :, span] = seen
    return output, lse


def _attend_suffixes_in_turn(tools: Tools, pack: Pack, states: LayerStates, query: Tensor) -> Part:
    """Attend to suffixes sequence by sequence, for any number of new tokens."""
    parts = []
    for index, span in enumerate(pack.spans):
        rows = query[:, :, span]
        seen = []
        if (past := states.past(index)) is not None:
            seen.append(tools.attend(rows, *_widened(past, query)))
        if pack.stores(index):
            keys, values = _widened(states.new(index), query)
            is_causal = rows.shape[2] > 1
            seen.append(tools.kernels.prefill(rows, keys, values, is_causal, tools.scale, softcap=tools.softcap))
        if len(seen) == 2:
            parts.append(_merged(tools, *seen))
        else:
            parts.append(seen[0] if seen else saw_nothing(rows))
    return _joined(parts)


def _attend_window_in_slots(tools: Tools, pack: Pack, states: LayerStates, query: Tensor, window: int) -> Part:
    """Attend within a window for one new token each."""
    part = _attend_slots(tools, pack, states, query, window)
    parts = []
    for group, (_, span) in enumerate(pack.groups):
        rows = query[:, :, span]
        tail = states.prefix(group)
        if tail is None:
            parts.append(saw_nothing(rows))
            continue
        keys, values = _widened(tail, query)
        num_last = pack.num_last[window][span]
        parts.append(tools.kernels.decode.attend_last(rows, keys, values, num_last, tools.scale, softcap=tools.softcap))
    return _merged(tools, _joined(parts), part)


def _attend_window(tools: Tools, pack: Pack, states: LayerStates, query: Tensor, window: int) -> Part:
    """Attend within a window, sequence by sequence, for any number of new tokens."""
    groups = [group for group, (_, span) in enumerate(pack.groups) for part in pack.spans if _is_within(part, span)]
    parts = []
    for index, (group, span) in enumerate(zip(groups, pack.spans, strict=True)):
        rows = query[:, :, span]
        seen = [part for part in (states.prefix(group), states.past(index), states.new(index)) if part is not None]
        reach = window - 1 + rows.shape[2]
        keys, values = (torch.cat(of, dim=2)[:, :, -reach:] for of in zip(*seen, strict=True))
        keys, values = _widened((keys, values), query)
        parts.append(tools.kernels.prefill(rows, keys, values, True, tools.scale, window=window, softcap=tools.softcap))
    return _joined(parts)


def _is_within(part: slice, span: slice) -> bool:
    return bool(span.start <= part.start and part.stop <= span.stop)


def _widened(states: KeysAndValues, query: Tensor) -> KeysAndValues:
    """Pad the channels with zeros to those of the queries, which were made as wide as the widest."""
    width = query.shape[-1]
    if all(part.shape[-1] == width for part in states):
        return states
    keys, values = (F.pad(part, (0, width - part.shape[-1])) for part in states)
    return keys, values


def _merged(tools: Tools, first: Part, second: Part) -> Part:
    return tools.merge_two(*first, *second), torch.logaddexp(first[1], second[1])


def _joined(parts: Sequence[Part]) -> Part:
    """Join parts of different tokens."""
    if len(parts) == 1:
        return parts[0]
    outputs, lses = zip(*parts, strict=True)
    return torch.cat(outputs, dim=2), torch.cat(lses, dim=2)
