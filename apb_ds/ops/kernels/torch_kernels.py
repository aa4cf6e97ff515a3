"""torch's own kernels, called directly because ``scaled_dot_product_attention`` does not return the log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor

from apb_ds.ops.kernels.base import Kernel, expand_kv_heads

HALF = (torch.bfloat16, torch.float16)


class CPUFlashKernel(Kernel):
    """Flash attention on CPU: tiled, so it never builds the matrix of logits; takes grouped KV heads."""

    name = "cpu_flash"
    device_type = "cpu"
    dtypes = (torch.float32, torch.float64, *HALF)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, dropout_p=0.0, is_causal=causal, attn_mask=None, scale=scale
        )
        return output, lse.float()


class TorchCudnnKernel(Kernel):
    """cuDNN attention through torch. Its causal mask is top-left aligned, which is only right for square cases."""

    name = "torch_cudnn"
    device_type = "cuda"
    dtypes = HALF
    max_head_dim = 128
    min_capability = 8

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        output, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, causal, False, scale=scale
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

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        output, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, causal, False, scale=scale
        )
        return output, lse[..., : query.shape[2]].float()

    def attend_first(
        self, query: Tensor, key: Tensor, value: Tensor, num_keys: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        # The variable-length form, with one sequence: (tokens, heads, head_dim) and the offsets of the sequences.
        q, k, v = (states[0].transpose(0, 1) for states in (query, key, value))
        offsets = torch.arange(2, dtype=torch.int32, device=query.device)
        output, lse, *_ = torch.ops.aten._flash_attention_forward(
            q, k, v, offsets, offsets * len(k), 1, len(k), 0.0, False, False, scale=scale, seqused_k=num_keys
        )
        return output.transpose(0, 1).unsqueeze(0), lse.reshape(query.shape[:3]).float()


class TorchEfficientKernel(Kernel):
    """Memory-efficient attention through torch: the CUDA kernel for float32. It needs repeated KV heads."""

    name = "torch_efficient"
    device_type = "cuda"
    dtypes = (torch.float32, *HALF)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        heads = query.shape[1]
        output, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, expand_kv_heads(key, heads), expand_kv_heads(value, heads), None, True, 0.0, causal, scale=scale
        )
        return output, lse[..., : query.shape[2]].float()  # the log-sum-exp is padded to a multiple of 32
