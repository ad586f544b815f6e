"""Attention over the C++ kernels, as `csrc/attention.h` describes them."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.native import function
from kernels.paged_kv import LayerKV, PagedKV, PagedLatent, Spans

_CHANGING = struct.Struct("PPPPq")
"""The first fields of `Arguments`: all that is new in a step."""
KV_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3}


class Arguments(ctypes.Structure):
    """`AttentionArguments` of csrc/attention_arguments.h."""

    _fields_ = (
        ("q", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("spans", ctypes.c_void_p),
        ("blocks", ctypes.c_void_p),
        ("num_spans", ctypes.c_int64),
        ("num_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("key_size", ctypes.c_int64),
        ("value_size", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
        ("window", ctypes.c_int64),
        ("sinks", ctypes.c_void_p),
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("k_scale", ctypes.c_void_p),
        ("v_scale", ctypes.c_void_p),
        ("block_size", ctypes.c_int64),
        ("type", ctypes.c_int32),
    )


def native_attention(name: str, q: Tensor, kv: LayerKV) -> Callable[[object], object] | None:
    """The kernel of that name, where it can work on these: float32 queries on CPU."""
    if q.device.type != "cpu" or q.dtype is not torch.float32 or kv[0].dtype not in KV_TYPES:
        return None
    assert all(part is None or part.is_contiguous() for part in kv), "a view of a cache instead of a cache"
    return function(name, "p")


class NativeAttention:
    """The kernel "penstock_attention" with all that stays the same from step to step: a layer's options and its cache.

    Little is left to do in a call: between the weights of two layers, everything has left the CPU's caches.
    """

    def __init__(
        self,
        run: Callable[[object], object],
        kv: PagedKV,
        num_heads: int,
        scale: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> None:
        num_kv_heads, block_size, value_size = kv.v.shape[1:]
        self._run, self._width = run, num_heads * value_size
        assert sinks is None or (sinks.dtype is torch.float32 and sinks.is_contiguous())
        self.kv, self._sinks = kv, sinks
        self._arguments = Arguments(
            *(None, None, None, None, 0, num_heads, num_kv_heads, kv.k.shape[2], value_size),
            *(scale, softcap or 0, window or 0, address(sinks)),
            *(kv.k.data_ptr(), kv.v.data_ptr(), address(kv.k_scale), address(kv.v_scale)),
            *(block_size, KV_TYPES[kv.k.dtype]),
        )
        self.address = ctypes.addressof(self._arguments)

    def __call__(self, q: Tensor, spans: Spans) -> Tensor:
        """q: [T, H, D] float32; returns [T, H Dv]."""
        q, table = q.contiguous(), spans.table
        num_spans = table.shape[0]
        out = torch.empty((q.shape[0], self._width))
        pointers = q.data_ptr(), out.data_ptr(), table.data_ptr(), spans.blocks.data_ptr()
        _CHANGING.pack_into(self._arguments, 0, *pointers, num_spans)
        self._run(self.address)
        return out


def attend_to_latents(
    run: Callable[[object], object], q: Tensor, kv: PagedLatent, spans: Spans, value_size: int, scale: float
) -> Tensor:
    """`mla_attention` of kernels/mla.py; `run` is "penstock_latent_attention"."""
    q, out = q.contiguous(), torch.empty((q.shape[0], q.shape[1] * value_size))
    arguments = Arguments(
        *(q.data_ptr(), out.data_ptr(), spans.table.data_ptr(), spans.blocks.data_ptr()),
        *(spans.table.shape[0], q.shape[1], 1, q.shape[2], value_size),
        *(scale, 0, 0, None, kv.latent.data_ptr(), None, None, None),
        *(kv.latent.shape[1], KV_TYPES[kv.latent.dtype]),
    )
    run(ctypes.addressof(arguments))
    return out


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
