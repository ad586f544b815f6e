"""Causal attention over a paged cache of latent vectors (multi-head latent attention, DeepSeek-V2, 2024).

In its absorbed form: the queries are in the space of the cached vectors, and all heads share one key, the vector, and
one value, its compressed part.
"""

from __future__ import annotations

from torch import Tensor

from kernels import paged_attention
from kernels.native_attention import attend_to_latents, native_attention
from kernels.paged_kv import PagedKV, PagedLatent, Spans


def mla_attention(q: Tensor, kv: PagedLatent, spans: Spans, *, scale: float, rank: int) -> Tensor:
    """Attention of all rows of a step over one KV head; their own vectors are in the cache already.

    q: [T, H, R + P], in the space of the cached vectors, whose first R (`rank`) elements are the values; returns
    [T, H R]. Of a row the same holds as in `paged_attention`.
    """
    if (run := native_attention("penstock_latent_attention", q, kv)) is not None:
        return attend_to_latents(run, q, kv, spans, rank, scale)
    latent = kv.latent.unsqueeze(1)
    heads = PagedKV(latent.transpose(2, 3), latent[..., :rank])
    return paged_attention.reference(q, heads, spans, scale, None, None, None)
