"""Putting new K and V into the paged cache."""

from __future__ import annotations

from torch import Tensor

from kernels.paged_kv import LayerKV, PagedKV, PagedLatent, token_views
from kernels.quantize import quantize_rows


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


def _put_(kv: LayerKV, slots: Tensor, *parts: Tensor) -> None:
    """Write each of `parts` [T, ...] into the view of the cache that it belongs to."""
    views = token_views(kv)
    blocks, offsets = slots // views[0].shape[1], slots % views[0].shape[1]
    for view, part in zip(views, parts, strict=True):
        view.index_put_((blocks, offsets), part)
