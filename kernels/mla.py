"""Causal attention over a paged cache of latent vectors (multi-head latent attention, DeepSeek-V2, 2024)."""

from __future__ import annotations

from torch import Tensor

from kernels.paged_attention import paged_attention
from kernels.paged_kv import PagedKV, PagedLatent, Spans


def mla_attention(q: Tensor, kv: PagedLatent, spans: Spans, *, scale: float, rank: int) -> Tensor:
    """Attention of all rows of a step over one KV head; their own vectors are in the cache already.

    q: [T, H, R + P], in the space of the cached vectors, whose first R (`rank`) elements are the values; returns
    [T, H R].
    """
    latent = kv.latent.unsqueeze(1)
    return paged_attention(q, PagedKV(latent.transpose(2, 3), latent[..., :rank]), spans, scale=scale)
