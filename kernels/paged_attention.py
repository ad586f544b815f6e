"""Causal attention over a paged KV cache, with grouped query heads (Ainslie et al., 2023).

Query head h reads KV head h // (H / K). The scale is 1 / sqrt(D). In the cache [num_blocks, block_size, 2, K, D], entry
i of a block table holds positions [i * block_size, (i + 1) * block_size) of its sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

MAX_GATHERED_BYTES = {"cpu": 16 * 2**20, "cuda": 512 * 2**20}
"""What decode gathers at once, if more than one row. On CPU, fresh memory costs more than the attention itself."""
_BITS = {2: torch.int16, 4: torch.int32}


def decode_attention(
    q: Tensor, kv_cache: Tensor, block_tables: Tensor, context_lens: Tensor, max_context_len: int
) -> Tensor:
    """One query token for each of B sequences, standing at the last position of its context.

    q: [B, H, D]; block_tables: [B, M] int64, padded with any valid block; context_lens: [B] int64, the query's own
    token included; max_context_len: their maximum, at most M * block_size; returns [B, H, D].

    What lies in the cache beyond a row's context, not-a-number included, has no effect on the row.
    """
    if q.shape[0] == 1:
        return _decode(q, kv_cache, block_tables, max_context_len, None)
    seen = torch.arange(max_context_len, device=q.device) < context_lens.unsqueeze(1)
    row_bytes = block_tables.shape[1] * kv_cache[0].numel() * kv_cache.element_size()
    num_rows = max(1, MAX_GATHERED_BYTES[q.device.type] // row_bytes)
    if q.shape[0] <= num_rows:
        return _decode(q, kv_cache, block_tables, max_context_len, seen)
    pieces = zip(*(torch.split(each, num_rows) for each in (q, block_tables, seen)), strict=True)
    return torch.cat([_decode(rows, kv_cache, tables, max_context_len, part) for rows, tables, part in pieces])


def _decode(q: Tensor, kv_cache: Tensor, block_tables: Tensor, num_positions: int, seen: Tensor | None) -> Tensor:
    """Attention over positions [0, num_positions), or where `seen` [B, num_positions]."""
    num_rows, num_heads, head_size = q.shape
    num_kv_heads = kv_cache.shape[3]
    blocks = kv_cache.index_select(0, block_tables.flatten())
    kv = blocks.view(num_rows, -1, 2, num_kv_heads, head_size)[:, :num_positions]
    mask = None
    if seen is not None:
        _erase_unseen_(kv, seen)
        mask = seen[:, None, None]
    k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
    grouped = q.view(num_rows, num_kv_heads, -1, head_size)
    return F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask).reshape(num_rows, num_heads, head_size)


def _erase_unseen_(kv: Tensor, seen: Tensor) -> None:
    """Zero K and V where not `seen` [B, S]. On the bits: a product with 0 would keep what is not a number."""
    bits = kv.view(_BITS[kv.element_size()]).flatten(2)
    bits.bitwise_and_(seen.to(bits.dtype).neg_().unsqueeze(2))


def prefill_attention(q: Tensor, kv_cache: Tensor, block_table: Tensor, start: int) -> Tensor:
    """T consecutive query tokens of one sequence, at positions [start, start + T); their K and V are in the cache.

    q: [T, H, D]; block_table: [M] int64, covering start + T positions; returns [T, H, D].
    """
    num_tokens, num_heads, head_size = q.shape
    num_kv_heads = kv_cache.shape[3]
    end = start + num_tokens
    kv = kv_cache.index_select(0, block_table).flatten(0, 1)[:end]
    grouped = q.view(num_tokens, num_kv_heads, -1, head_size).permute(1, 2, 0, 3)
    shape = (num_kv_heads, grouped.shape[1], end, head_size)
    k, v = (kv[:, i].transpose(0, 1).unsqueeze(1).expand(shape) for i in (0, 1))
    mask = None
    if start > 0:
        positions = torch.arange(end, device=q.device)
        mask = positions <= positions[start:].unsqueeze(1)
    out = F.scaled_dot_product_attention(grouped, k, v, attn_mask=mask, is_causal=mask is None)
    return out.permute(2, 0, 1, 3).reshape(num_tokens, num_heads, head_size)
