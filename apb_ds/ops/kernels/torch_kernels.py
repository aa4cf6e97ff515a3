"""torch's own kernels, called directly because ``scaled_dot_product_attention`` does not return the log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor

from apb_ds.ops.kernels.base import Kernel, Logits, expand_kv_heads
from apb_ds.ops.kernels.pieces import attend_in_pieces, attend_in_windows

HALF = (torch.bfloat16, torch.float16)


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
        return self._call(query, key, value, logits.scale, is_causal=logits.causal)

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
