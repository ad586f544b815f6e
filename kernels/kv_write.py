"""Putting new K and V into the paged cache."""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.paged_kv import LayerKV, PagedKV, PagedLatent, token_views


def write_kv_(kv: PagedKV, slots: Tensor, k: Tensor, v: Tensor) -> None:
    """Store the K and V of T tokens, converted to what the cache holds.

    slots: [T] int64, `block * S + offset`, no two alike; k, v: [T, K, D].
    """
    if kv.k_scale is None:
        _put_(kv, slots, k.to(kv.k.dtype), v.to(kv.v.dtype))
    else:
        (k_codes, k_scale), (v_codes, v_scale) = quantize_rows(k), quantize_rows(v)
        _put_(kv, slots, k_codes, v_codes, k_scale, v_scale)


def write_latent_(kv: PagedLatent, slots: Tensor, latent: Tensor) -> None:
    """Store the latent vectors of T tokens. slots: as in `write_kv_`; latent: [T, R + P]."""
    _put_(kv, slots, latent.to(kv.latent.dtype))


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric int8 over the last dimension: codes of x's shape and float32 scales [...], `x = codes * scale`.

    `scale = max|x| / 127`, `codes = round(x * (127 / max|x|))`, half to even; all zero where x is.
    """
    wide = x.to(torch.float32)
    largest = wide.abs().amax(dim=-1)
    factors = torch.where(largest > 0, 127.0 / largest, 0.0)
    return (wide * factors.unsqueeze(-1)).round_().to(torch.int8), largest / 127.0


def _put_(kv: LayerKV, slots: Tensor, *parts: Tensor) -> None:
    """Write each of `parts` [T, ...] into the view of the cache that it belongs to."""
    views = token_views(kv)
    blocks, offsets = slots // views[0].shape[1], slots % views[0].shape[1]
    for view, part in zip(views, parts, strict=True):
        view.index_put_((blocks, offsets), part)
