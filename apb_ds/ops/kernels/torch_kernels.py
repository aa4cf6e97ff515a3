"""torch's own kernels, called directly because ``scaled_dot_product_attention`` does not return the log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor

from apb_ds.ops.kernels.base import Kernel, expand_kv_heads, fold_heads, unfold_heads, without_keys
from apb_ds.ops.kernels.pieces import Logits, additive_mask, attend_in_pieces, attend_in_windows, earlier_keys

HALF = (torch.bfloat16, torch.float16)
# On CPU, few queries read keys once per KV head: 8192 keys take half the time for one query, 3% less for 32.
FOLDED_QUERIES = 8
# On CPU, the keys that a row can attend to in the time that one more call takes (9 heads of dimension 64).
CALL_KEYS = 100


class CPUFlashKernel(Kernel):
    """Flash attention on CPU: tiled, so it never builds the matrix of logits; takes grouped KV heads."""

    name = "cpu_flash"
    device_type = "cpu"
    dtypes = (torch.float32, torch.float64, *HALF)
    has_window = True  # by a mask over the keys of a piece
    has_softcap = True  # in plain torch

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, logits: Logits) -> tuple[Tensor, Tensor]:
        if logits.softcap is not None:
            return attend_in_pieces(query, key, value, logits)
        if logits.window is not None:
            return attend_in_windows(self._call, query, key, value, logits.scale, logits.window)
        heads, kv_heads = query.shape[1], key.shape[1]
        if logits.causal or heads == kv_heads or query.shape[2] > FOLDED_QUERIES or query.dtype in HALF:
            return self._call(query, key, value, logits.scale, is_causal=logits.causal)
        return unfold_heads(*self._call(fold_heads(query, kv_heads), key, value, logits.scale), heads)

    def attend_slots(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        slots: Tensor,
        num_keys: Tensor,
        scale: float,
        *,
        window: int | None = None,
        softcap: float | None = None,
        have_keys: bool = False,
    ) -> tuple[Tensor, Tensor]:
        self._check(window, softcap)
        places, counts = slots.tolist(), num_keys.tolist()
        low, high = min(places), max(places) + 1
        first, stop = 0 if window is None else max(0, min(counts) - window), max(counts)
        # One call attends to a rectangle: all the slots from the first to the last, and as many keys of each.
        lone_calls = sum(min(count, window or count) + CALL_KEYS for count in counts)
        if softcap is not None or stop == 0 or (high - low) * (stop - first) > lone_calls:
            return super().attend_slots(query, key, value, slots, num_keys, scale, window=window, softcap=softcap)
        heads, kv_heads = query.shape[1], key.shape[1]
        in_order = places == list(range(low, high))
        if not in_order:
            # Queries are spread over the slots, as copying keys would take longer.
            index = slots.long() - low
            query = query.new_zeros(high - low, *query.shape[1:]).index_copy_(0, index, query)
            num_keys = num_keys.new_zeros(high - low).index_copy_(0, index, num_keys)
        k, v = (states[low:high, :, first:stop] for states in (key, value))
        mask = None
        if not in_order or min(counts) < stop:
            bound, place = num_keys.unsqueeze(1), torch.arange(first, stop)
            hidden = place >= bound
            if window is not None:
                hidden |= place < bound - window
            mask = additive_mask(hidden, query.dtype)[:, None, None]
        output, lse = unfold_heads(*self._call(fold_heads(query, kv_heads), k, v, scale, mask=mask), heads)
        if not in_order:
            output, lse, num_keys = (each.index_select(0, index) for each in (output, lse, num_keys))
        return without_keys(output, lse, (num_keys == 0).view(-1, 1, 1)) if min(counts) == 0 else (output, lse)

    def attend_last(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        num_last: Tensor,
        scale: float,
        *,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        most = min(int(num_last.max()), key.shape[2])
        if softcap is not None or most == 0:
            return super().attend_last(query, key, value, num_last, scale, softcap=softcap)
        key, value = key[:, :, -most:], value[:, :, -most:]
        fewest = int(num_last.min())
        mask = None
        if fewest < most:
            mask = additive_mask(earlier_keys(num_last, range(most), most), query.dtype)
        output, lse = self._call(query, key, value, scale, mask=mask)
        return without_keys(output, lse, num_last == 0) if fewest == 0 else (output, lse)

    @staticmethod
    def _call(
        query: Tensor, key: Tensor, value: Tensor, scale: float, is_causal: bool = False, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p=0.0, is_causal=is_causal, attn_mask=mask, scale=scale
        )
        return output, lse.float()


class TorchCudnnKernel(Kernel):
    """cuDNN attention through torch. Its causal mask is top-left aligned, which is only right for square cases."""

    name = "torch_cudnn"
    device_type = "cuda"
    dtypes = HALF
    max_head_dim = 128
    min_capability = 8

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, logits: Logits) -> tuple[Tensor, Tensor]:
        output, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, logits.causal, False, scale=logits.scale
        )
        return output, lse.reshape(query.shape[:3]).float()


class TorchFlashKernel(Kernel):
    """FlashAttention 2 as built into torch. It splits the keys of a single query, so it is fast in decoding."""

    name = "torch_flash"
    device_type = "cuda"
    dtypes = HALF
    max_head_dim = 256
    min_capability = 8
    can_be_recorded = True
    has_window = True

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, logits: Logits) -> tuple[Tensor, Tensor]:
        if logits.window is None:
            output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
                query, key, value, 0.0, logits.causal, False, scale=logits.scale
            )
            return output, lse[..., : query.shape[2]].float()
        q, k, v = (states.transpose(1, 2) for states in (query, key, value))
        output, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, None, None, q.shape[1], k.shape[1], 0.0, True, False, scale=logits.scale, **_sides(logits.window)
        )
        return output.transpose(1, 2), lse[..., : query.shape[2]].float()

    def attend_first(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        num_keys: Tensor,
        scale: float,
        *,
        window: int | None = None,
        softcap: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        self._check(window, softcap)
        # The variable-length form, with one sequence: (tokens, heads, head_dim) and the offsets of the sequences.
        q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
        offsets = torch.arange(2, dtype=torch.int32, device=query.device)
        sides = {} if window is None else _sides(window)
        output, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, offsets, offsets * len(k), 1, len(k), 0.0, False, False, scale=scale, seqused_k=num_keys, **sides
        )
        return output.transpose(0, 1).unsqueeze(0), lse.reshape(query.shape[:3]).float()

    def attend_slots(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        slots: Tensor,
        num_keys: Tensor,
        scale: float,
        *,
        window: int | None = None,
        softcap: float | None = None,
        have_keys: bool = False,
    ) -> tuple[Tensor, Tensor]:
        self._check(window, softcap)
        rows, capacity = len(query), key.shape[2]
        # The variable-length form, of one token each. With `seqused_k`, it reads only where each sequence's keys start.
        q, k, v = query.squeeze(2), key.transpose(1, 2).flatten(0, 1), value.transpose(1, 2).flatten(0, 1)
        tokens = torch.arange(rows + 1, dtype=torch.int32, device=query.device)
        starts = torch.zeros_like(tokens)
        starts[:rows] = slots * capacity
        sides = {} if window is None else _sides(window)
        output, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, tokens, starts, 1, capacity, 0.0, False, False, scale=scale, seqused_k=num_keys, **sides
        )
        # The log-sum-exp is (heads, rows), and plus infinity where there are no keys.
        lse = lse.transpose(0, 1).unsqueeze(2).float()
        output = output.unsqueeze(2)
        return (output, lse) if have_keys else without_keys(output, lse, (num_keys == 0).view(-1, 1, 1))


class TorchEfficientKernel(Kernel):
    """Memory-efficient attention through torch: the CUDA kernel for float32. It needs repeated KV heads."""

    name = "torch_efficient"
    device_type = "cuda"
    dtypes = (torch.float32, *HALF)
    has_window = True  # both in plain torch: the backend takes a mask only as a bias for every head
    has_softcap = True

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, logits: Logits) -> tuple[Tensor, Tensor]:
        if logits.window is not None or logits.softcap is not None:
            return attend_in_pieces(query, key, value, logits)
        keys, values = (expand_kv_heads(states, query.shape[1]) for states in (key, value))
        output, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, keys, values, None, True, 0.0, logits.causal, scale=logits.scale
        )
        return output, lse[..., : query.shape[2]].float()  # the log-sum-exp is padded to a multiple of 32


def _sides(window: int) -> dict[str, int]:
    """Return the arguments of torch's flash attention for a window: how many keys on each side of the query's place."""
    return {"window_size_left": window - 1, "window_size_right": 0}
