"""What stands between the QKV projection and attention: split, norm of Q and K, rotation, and the write into the cache.

T tokens, H query heads, K KV heads, D head size, P rotated elements of a head.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.kv_write import write_kv_
from kernels.native import function
from kernels.native_attention import KV_TYPES, address
from kernels.paged_kv import PagedKV
from kernels.rms_norm import rms_norm
from kernels.rope import apply_rope


class QKVWrite:
    """Splits, normalises, rotates and stores Q, K and V of one layer; what it is given is always of one type.

    q_norm, k_norm: weights of a root mean square norm before the rotation: [D], over each head, or [H D] and [K D],
    over all heads together.
    """

    def __init__(
        self, q_norm: Tensor | None, k_norm: Tensor | None, eps: float, num_heads: int, num_kv_heads: int
    ) -> None:
        self._options = q_norm, k_norm, eps, num_heads, num_kv_heads
        self._native: NativeQKVWrite | None = None

    def __call__(self, qkv: Tensor, kv: PagedKV, slots: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Write the K and V of T tokens into their slots; returns their Q, [T, H, D].

        qkv: [T, (H + 2K) D], Q's heads first, then K's, then V's; slots: as in `write_kv_`; cos, sin: [T, P/2] from
        `rope_angles`.
        """
        if self._native is None or self._native.kv is not kv:
            run = function("penstock_qkv_rope_write", "p")
            if run is None or qkv.device.type != "cpu" or qkv.dtype is not torch.float32:
                return reference(qkv, kv, slots, cos, sin, *self._options)
            self._native = NativeQKVWrite(run, kv, *self._options)
        return self._native(qkv, slots, cos, sin)


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


class _Arguments(ctypes.Structure):
    """`QKVArguments` of csrc/qkv.h."""

    _fields_ = (
        ("qkv", ctypes.c_void_p),
        ("q", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("num_tokens", ctypes.c_int64),
        ("half", ctypes.c_int64),
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("k_scale", ctypes.c_void_p),
        ("v_scale", ctypes.c_void_p),
        ("q_norm", ctypes.c_void_p),
        ("k_norm", ctypes.c_void_p),
        ("num_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_size", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("q_norm_is_wide", ctypes.c_int32),
        ("k_norm_is_wide", ctypes.c_int32),
        ("eps", ctypes.c_float),
        ("type", ctypes.c_int32),
    )


_CHANGING = struct.Struct("PPPPPqq")
"""The first fields of `_Arguments`: all that is new in a step."""


class NativeQKVWrite:
    """The kernel with all that stays the same from step to step."""

    def __init__(
        self,
        run: Callable[[object], object],
        kv: PagedKV,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        num_heads: int,
        num_kv_heads: int,
    ) -> None:
        head_size, block_size = kv.k.shape[2:]
        assert all(part is None or part.is_contiguous() for part in kv), "a view of a cache instead of a cache"
        assert all(w is None or (w.dtype is torch.float32 and w.is_contiguous()) for w in (q_norm, k_norm))
        self._run, self._shape = run, (num_heads, head_size)
        self.kv, self._norms = kv, (q_norm, k_norm)
        self._arguments = _Arguments(
            *(None, None, None, None, None, 0, 0),
            *(address(part) for part in kv),
            *(address(q_norm), address(k_norm), num_heads, num_kv_heads, head_size, block_size),
            *(w is not None and w.numel() > head_size for w in (q_norm, k_norm)),
            *(eps, KV_TYPES[kv.k.dtype]),
        )
        self.address = ctypes.addressof(self._arguments)

    def __call__(self, qkv: Tensor, slots: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        qkv, cos, sin = qkv.contiguous(), cos.contiguous(), sin.contiguous()
        num_tokens, half = cos.shape
        q = torch.empty((num_tokens, *self._shape))
        pointers = qkv.data_ptr(), q.data_ptr(), slots.data_ptr(), cos.data_ptr(), sin.data_ptr()
        _CHANGING.pack_into(self._arguments, 0, *pointers, num_tokens, half)
        self._run(self.address)
        return q
