"""What stands between the QKV projection and attention: split, norm of Q and K, rotation, and the write into the cache.

T tokens, H query heads, K KV heads, D head size, P rotated elements of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.kv_write import write_kv_
from kernels.paged_kv import PagedKV
from kernels.rms_norm import rms_norm
from kernels.rope import apply_rope


def qkv_rope_write_(
    qkv: Tensor,
    kv: PagedKV,
    slots: Tensor,
    cos: Tensor,
    sin: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    num_heads: int,
    num_kv_heads: int,
) -> Tensor:
    """Write the K and V of T tokens into their slots; returns their Q, [T, H, D].

    qkv: [T, (H + 2K) D], Q's heads first, then K's, then V's; slots: as in `write_kv_`; cos, sin: [T, P/2] from
    `rope_angles`; q_norm, k_norm: weights of a root mean square norm before the rotation: [D], over each head, or
    [H D] and [K D], over all heads together.
    """
    num_tokens = qkv.shape[0]
    heads = qkv.view(num_tokens, num_heads + 2 * num_kv_heads, -1)
    q, k, v = torch.split(heads, [num_heads, num_kv_heads, num_kv_heads], dim=1)
    q, k = (apply_rope(_norm(x, weight, eps), cos, sin) for x, weight in ((q, q_norm), (k, k_norm)))
    write_kv_(kv, slots, k, v)
    return q


def _norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x: [T, N, D]; returns its shape."""
    if weight is None:
        return x
    if weight.numel() == x.shape[-1]:
        return rms_norm(x, weight, eps)
    return rms_norm(x.flatten(1), weight, eps).view(x.shape)
