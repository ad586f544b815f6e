"""Multi-head latent attention over the compressed cache (DeepSeek-V2, 2024), in its absorbed form.

T rows of a step, H heads; R size of the compressed latent, P of its rotary part. The up-projection of K is folded into
the queries and that of V is left to the caller: all heads share one key, the latent with its rotary part, and one
value, the latent alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.native_attention import attend_to_latents, native_attention
from kernels.paged_kv import PagedLatent, Spans


def mla_attention(q: Tensor, kv: PagedLatent, spans: Spans, *, latent_size: int, scale: float) -> Tensor:
    """Attention of all rows of a step; their own latents are in the cache already. Returns [T, H, R].

    q: [T, H, R + P]; latent_size: R; scale: of the logits. The same holds of a row as in `paged_attention`.
    """
    if (run := native_attention("penstock_latent_attention", q, kv)) is not None:
        return attend_to_latents(run, q, kv, spans, latent_size, scale)
    return reference(q, kv, spans, latent_size, scale)


def reference(q: Tensor, kv: PagedLatent, spans: Spans, latent_size: int, scale: float) -> Tensor:
    """The same in torch, on any device."""
    block_size = kv.latent.shape[1]
    outputs = []
    for row, num_rows, start, offset in spans.host_table.tolist():
        end = start + num_rows
        blocks = spans.blocks[offset : offset - (-end // block_size)]
        latents = kv.latent[blocks].flatten(0, 1)[:end].to(q.dtype)
        logits = torch.einsum("thd,cd->htc", q[row : row + num_rows], latents).to(torch.float32) * scale
        positions = torch.arange(end, device=q.device)
        logits.masked_fill_(positions > positions[start:].unsqueeze(1), float("-inf"))
        weights = logits.softmax(dim=-1).to(q.dtype)
        outputs.append(torch.einsum("htc,cr->thr", weights, latents[:, :latent_size]))
    return torch.cat(outputs)
