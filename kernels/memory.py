"""Memory that is read from one end to the other, step after step."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Callable

import torch
from torch import Tensor

Allocate = Callable[[int], Tensor]
"""Gives a number of bytes, all zeros."""

_ALIGNMENT = 64
_CHUNK_BYTES = 64 * 2**20


def zeros(num_bytes: int) -> Tensor:
    """[num_bytes] uint8 on the CPU, all zeros, in huge pages where the system has them: a fifth more bandwidth.

    A page takes memory once it is first written. The memory is free when the tensor and all its views are gone.
    """
    if num_bytes == 0:
        return torch.zeros(0, dtype=torch.uint8)
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)


def give_back() -> None:
    """Return what the C heap holds free to the system: loading leaves holes there. Nothing where it is not glibc."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))


class Arena:
    """`zeros` for many small pieces that are read together: they share huge pages."""

    def __init__(self) -> None:
        self._rest = zeros(0)

    def __call__(self, num_bytes: int) -> Tensor:
        if num_bytes > self._rest.numel():
            self._rest = zeros(max(num_bytes, _CHUNK_BYTES))
        piece = self._rest[:num_bytes]
        self._rest = self._rest[-(-num_bytes // _ALIGNMENT) * _ALIGNMENT :]
        return piece
