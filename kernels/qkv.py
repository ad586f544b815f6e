"""What stands between the QKV projection and attention: split, norm of Q and K, rotation, and the write into the cache.

T tokens, H query heads, K KV heads, D head size, P rotated elements of a head.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.kv_write import write_kv_
from kernels.native import function
from kernels.native_attention import KV_TYPES, address
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
    arguments = (qkv, kv, slots, cos, sin, q_norm, k_norm, eps, num_heads, num_kv_heads)
    run = function("penstock_qkv_rope_write", "p")
    if run is not None and qkv.device.type == "cpu" and qkv.dtype is torch.float32:
        return _native(run, *arguments)
    return reference(*arguments)


def reference(
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
    """The same in torch, on any device."""
    heads = qkv.view(qkv.shape[0], num_heads + 2 * num_kv_heads, -1)
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


class Arguments(ctypes.Structure):
    """`Arguments` of csrc/qkv.cpp."""

    _fields_ = (
        ("qkv", ctypes.c_void_p),
        ("q", ctypes.c_void_p),
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("k_scale", ctypes.c_void_p),
        ("v_scale", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("q_norm", ctypes.c_void_p),
        ("k_norm", ctypes.c_void_p),
        ("num_tokens", ctypes.c_int64),
        ("num_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_size", ctypes.c_int64),
        ("half", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("q_norm_is_wide", ctypes.c_int32),
        ("k_norm_is_wide", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("type", ctypes.c_int32),
    )


def _native(
    run: Callable[[object], object],
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
    head_size, block_size = kv.k.shape[2:]
    qkv, cos, sin = qkv.contiguous(), cos.contiguous(), sin.contiguous()
    q = torch.empty((qkv.shape[0], num_heads, head_size))
    assert all(part is None or part.is_contiguous() for part in kv), "a view of a cache instead of a cache"
    assert all(w is None or (w.dtype is torch.float32 and w.is_contiguous()) for w in (q_norm, k_norm))
    arguments = Arguments(
        *(qkv.data_ptr(), q.data_ptr()),
        *(address(part) for part in kv),
        *(slots.data_ptr(), cos.data_ptr(), sin.data_ptr(), address(q_norm), address(k_norm)),
        *(qkv.shape[0], num_heads, num_kv_heads, head_size, cos.shape[1], block_size),
        *(w is not None and w.numel() > head_size for w in (q_norm, k_norm)),
        *(eps, KV_TYPES[kv.k.dtype]),
    )
    run(ctypes.addressof(arguments))
    return q
