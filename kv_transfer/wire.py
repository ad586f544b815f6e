"""Payloads as they travel for one ticket: as the cache holds them, or rounded, which is not exact (DESIGN, 4)."""

from __future__ import annotations

import torch
from torch import Tensor

from core.kv_layout import KVLayout, WireDtype
from kernels.kv_wire import round_kv, widen_kv


def to_wire(payload: Tensor, cache: KVLayout, dtype: WireDtype) -> Tensor:
    """What leaves of a payload that `KVStorage.read` gave: [N] uint8 both."""
    if cache.on_wire(dtype) == cache:
        return payload
    return round_kv(payload, getattr(torch, cache.dtype), cache.head_size)


def from_wire(payload: Tensor, cache: KVLayout, dtype: WireDtype) -> Tensor:
    """What `KVStorage.write` takes of what has come."""
    if cache.on_wire(dtype) == cache:
        return payload
    return widen_kv(payload, getattr(torch, cache.dtype), cache.head_size)
