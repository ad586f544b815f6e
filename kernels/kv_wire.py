"""K and V rounded for their way from worker to worker.

M vectors of D elements: one for each token, KV head, and K or V. What `round_kv` makes of a payload of a float cache is
laid out as the payload of an int8 cache: codes [M, D] int8, then scales [M] float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.native import function
from kernels.native_attention import KV_TYPES
from kernels.quantize import quantize_rows

SCALE_BYTES = 4


def round_kv(payload: Tensor, dtype: torch.dtype, head_size: int) -> Tensor:
    """[M (D + 4)] uint8 of a payload [M D] of `dtype`, itself as uint8. Each value is off by half a scale at most.

    The values must be finite. A vector depends on no other, so neither does it on how a prompt was cut.
    """
    num_vectors = payload.numel() // (head_size * dtype.itemsize)
    run = function("penstock_round_kv", "pqqipp") if payload.device.type == "cpu" else None
    if run is None:
        codes, scales = quantize_rows(payload.view(dtype).view(num_vectors, head_size))
        return torch.cat((codes.flatten().view(torch.uint8), scales.view(torch.uint8)))
    out = torch.empty(num_vectors * (head_size + SCALE_BYTES), dtype=torch.uint8)
    scales_at = out.data_ptr() + num_vectors * head_size
    run(payload.data_ptr(), num_vectors, head_size, KV_TYPES[dtype], out.data_ptr(), scales_at)
    return out


def widen_kv(payload: Tensor, dtype: torch.dtype, head_size: int) -> Tensor:
    """[M D] of `dtype`, as uint8, of what `round_kv` made."""
    num_vectors = payload.numel() // (head_size + SCALE_BYTES)
    run = function("penstock_widen_kv", "ppqqip") if payload.device.type == "cpu" else None
    if run is None:
        codes, scales = torch.split(payload, [num_vectors * head_size, num_vectors * SCALE_BYTES])
        wide = codes.view(torch.int8).view(num_vectors, head_size) * scales.clone().view(torch.float32).unsqueeze(1)
        return wide.to(dtype).flatten().view(torch.uint8)
    out = torch.empty(num_vectors * head_size * dtype.itemsize, dtype=torch.uint8)
    scales_at = payload.data_ptr() + num_vectors * head_size
    run(payload.data_ptr(), scales_at, num_vectors, head_size, KV_TYPES[dtype], out.data_ptr())
    return out
