"""Causal attention over a paged KV cache, with grouped query heads (Ainslie et al., 2023).

T rows of a step, H query heads, K KV heads, D head size. Query head h reads KV head h // (H / K). A row sees the
positions up to its own, and with a window only the last `window` of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.native_attention import NativeAttention, native_attention
from kernels.paged_kv import PagedKV, Spans

MAX_GATHERED_BYTES = {"cpu": 16 * 2**20, "cuda": 512 * 2**20}
"""What the reference gathers at once, if more than one span."""


class PagedAttention:
    """Attention of one layer, over one cache after the other; queries are always of one type and on one device.

    scale: of the logits q k; softcap: logits become `softcap * tanh(logits / softcap)` (Gemma 2); sinks: [H] float32, a
    logit for each head that takes part in the softmax and has no value (gpt-oss).
    """

    def __init__(
        self, scale: float, window: int | None = None, softcap: float | None = None, sinks: Tensor | None = None
    ) -> None:
        self._options = scale, window, softcap, sinks
        self._native: NativeAttention | None = None

    def __call__(self, q: Tensor, kv: PagedKV, spans: Spans) -> Tensor:
        """All rows of a step; their own K and V are in the cache already. q: [T, H, D]; returns [T, H D].

        What lies in the cache beyond a row's context, not-a-number included, has no effect on the row. On CPU a float32
        row comes out the same, bit for bit, whatever is computed beside it and wherever its prompt was cut.
        """
        if self._native is None or self._native.kv is not kv:
            run = native_attention("penstock_attention", q, kv)
            if run is None:
                return reference(q, kv, spans, *self._options)
            self._native = NativeAttention(run, kv, q.shape[1], *self._options)
        return self._native(q, spans)


def reference(
    q: Tensor,
    kv: PagedKV,
    spans: Spans,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """The same in torch, on any device."""
    outputs = []
    for first, last, num_rows, num_blocks in _groups(spans, kv):
        table = spans.table[first:last]
        group = q[int(spans.host_table[first, 0]) :][: num_rows * (last - first)]
        k, v = _gather(kv, _block_tables(table, spans.blocks, num_blocks, kv.v.shape[2]), q.dtype)
        start = table[:, 2].unsqueeze(1)
        at = start + torch.arange(num_rows, device=q.device)
        seen = _seen(k, v, start + num_rows, at, window)
        outputs.append(_attend(group.view(last - first, num_rows, *q.shape[1:]), k, v, seen, scale, softcap, sinks))
    return torch.cat(outputs)


def _groups(spans: Spans, kv: PagedKV) -> Iterator[tuple[int, int, int, int]]:
    """Neighbouring spans that are computed at once: first, last, rows of each, and blocks that cover any of them.

    They have as many rows and contexts of similar length, between two powers of two blocks; and are not too many for
    `MAX_GATHERED_BYTES`.
    """
    block_size = kv.v.shape[2]
    block_bytes = (kv.k[0].numel() + kv.v[0].numel()) * max(4, kv.k.element_size())
    limit = MAX_GATHERED_BYTES[kv.k.device.type]
    sizes = [(num_rows, -(-(start + num_rows) // block_size)) for _, num_rows, start, _ in spans.host_table.tolist()]
    first = 0
    for (num_rows, _), group in groupby(sizes, key=lambda size: (size[0], (size[1] - 1).bit_length())):
        lengths = [num_blocks for _, num_blocks in group]
        step = max(1, limit // (max(lengths) * block_bytes))
        for i in range(0, len(lengths), step):
            part = lengths[i : i + step]
            yield first + i, first + i + len(part), num_rows, max(part)
        first += len(lengths)


def _block_tables(table: Tensor, blocks: Tensor, num_blocks: int, block_size: int) -> Tensor:
    """[N, num_blocks] int64 of N spans, padded with block 0. table: [N, 4]; blocks: [M]."""
    columns = torch.arange(num_blocks, device=table.device)
    used = columns * block_size < (table[:, 1] + table[:, 2]).unsqueeze(1)
    places = torch.where(used, table[:, 3].unsqueeze(1) + columns, 0)
    return torch.where(used, blocks[places], 0).to(torch.int64)


def _gather(kv: PagedKV, tables: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """K and V of N sequences, [N, K, C, D] each, of `dtype`. tables: [N, M]; C is M times the block size."""
    num_seqs, flat = tables.shape[0], tables.flatten()

    def gather(x: Tensor) -> Tensor:
        """[B, K, S, ...] to [N, K, C, ...]"""
        return x[flat].view(num_seqs, -1, *x.shape[1:]).transpose(1, 2).flatten(2, 3)

    k, v = gather(kv.k.transpose(2, 3)), gather(kv.v)
    if kv.k_scale is not None and kv.v_scale is not None:
        k, v = k * gather(kv.k_scale).unsqueeze(-1), v * gather(kv.v_scale).unsqueeze(-1)
    return k.to(dtype), v.to(dtype)


def _seen(k: Tensor, v: Tensor, context_lens: Tensor, at: Tensor, window: int | None) -> Tensor:
    """Which positions each row sees, [N, R, C]; K and V beyond the contexts are zeroed, whatever they were.

    k, v: [N, K, C, D]; context_lens: [N, 1]; at: [N, R], the positions of the rows.
    """
    positions = torch.arange(k.shape[2], device=k.device)
    beyond = (positions >= context_lens)[:, None, :, None]
    k.masked_fill_(beyond, 0)
    v.masked_fill_(beyond, 0)
    seen = positions <= at.unsqueeze(2)
    return seen if window is None else seen & (positions > at.unsqueeze(2) - window)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """q: [N, R, H, D]; k, v: [N, K, C, D]; seen: [N, R, C]; returns [N R, H D].

    The heads that share a KV head become rows.
    """
    num_seqs, num_rows, num_heads, head_size = q.shape
    num_kv_heads = k.shape[1]
    group = num_heads // num_kv_heads
    rows = q.view(num_seqs, num_rows, num_kv_heads, -1).transpose(1, 2).reshape(num_seqs, num_kv_heads, -1, head_size)
    mask = seen.repeat_interleave(group, dim=1).unsqueeze(1)
    if softcap is None and sinks is None:
        out = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale)
    else:
        logits = (rows @ k.transpose(2, 3)).to(torch.float32) * scale
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        logits.masked_fill_(~mask, float("-inf"))
        if sinks is not None:
            column = sinks.view(1, num_kv_heads, 1, group).expand(num_seqs, -1, num_rows, -1).flatten(2).unsqueeze(3)
            logits = torch.cat((logits, column), dim=3)
        out = logits.softmax(dim=-1)[..., : k.shape[2]].to(v.dtype) @ v
    return out.view(num_seqs, num_kv_heads, num_rows, -1).transpose(1, 2).reshape(num_seqs * num_rows, -1)
