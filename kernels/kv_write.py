"""Putting new K and V into the paged cache."""

from __future__ import annotations

from torch import Tensor


def write_kv_(kv_cache: Tensor, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """Store the K and V of T tokens.

    kv_cache: [num_blocks, block_size, 2, K, D]; slots: [T] int64, `block * block_size + offset`, no two alike;
    k, v: [T, K, D].
    """
    flat = kv_cache.flatten(0, 1)
    flat.select(1, 0).index_copy_(0, slots, k)
    flat.select(1, 1).index_copy_(0, slots, v)
