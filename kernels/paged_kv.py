"""The paged cache of one layer as tensors, and the rows of a step that read it.

B blocks of S positions each; K KV heads, D head size; R size of the compressed latent, P of its rotary part. Entry i of
a block table holds positions [i S, (i + 1) S) of its sequence.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kernels import memory


class PagedKV(NamedTuple):
    """K and V of each head. K stands in columns, so that one element of S positions is one vector."""

    k: Tensor
    """[B, K, D, S]"""
    v: Tensor
    """[B, K, S, D]"""
    k_scale: Tensor | None = None
    """[B, K, S] float32 where k is int8: a vector is its codes times its scale."""
    v_scale: Tensor | None = None


class PagedLatent(NamedTuple):
    """What multi-head latent attention caches: one vector a token, shared by all heads (DeepSeek-V2, 2024)."""

    latent: Tensor
    """[B, S, R + P]"""


LayerKV = PagedKV | PagedLatent


class Spans(NamedTuple):
    """Rows of a step, grouped by sequence: N spans of consecutive rows at consecutive positions. A decode is one row.

    A span is `row_start, num_rows, start, table_offset`: rows [row_start, row_start + num_rows) stand at positions from
    `start` on, and `blocks[table_offset:]` begins with the block table of their sequence. The spans come in the order
    of their rows and leave none out.
    """

    table: Tensor
    """[N, 4] int32"""
    blocks: Tensor
    """[M] int32: the block tables, one after the other."""
    host_table: Tensor
    """`table` in host memory: the same tensor on CPU."""


class PickedRows(NamedTuple):
    """The rows of a step whose results are asked for: of the others a model needs K and V alone."""

    rows: Tensor
    """[S] int64, ascending."""
    spans: Spans
    """Of these rows as if there were no others."""


def empty_kv(
    num_blocks: int, num_kv_heads: int, head_size: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> PagedKV:
    """A layer's cache, zeroed."""
    k = zeros((num_blocks, num_kv_heads, head_size, block_size), dtype, device)
    v = zeros((num_blocks, num_kv_heads, block_size, head_size), dtype, device)
    if dtype is not torch.int8:
        return PagedKV(k, v)
    k_scale, v_scale = torch.zeros(2, num_blocks, num_kv_heads, block_size, device=device)
    return PagedKV(k, v, k_scale, v_scale)


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of zeros; on CPU in huge pages where there are any."""
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    return memory.zeros(math.prod(shape) * dtype.itemsize).view(dtype).view(shape)


def token_views(kv: LayerKV) -> tuple[Tensor, ...]:
    """Views [B, S, ...] of all that a cache holds: what stands at [block, offset] belongs to one token."""
    if isinstance(kv, PagedLatent):
        return (kv.latent,)
    views = (kv.k.permute(0, 3, 1, 2), kv.v.transpose(1, 2))
    if kv.k_scale is None or kv.v_scale is None:
        return views
    return (*views, kv.k_scale.transpose(1, 2), kv.v_scale.transpose(1, 2))
