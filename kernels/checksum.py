"""A 64-bit checksum of a tensor's bytes that CPU and GPU agree on."""

from __future__ import annotations

import ctypes
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from kernels.native import function

_CHUNK = 1 << 16  # words; the weights of a chunk take 512 KiB: they stay in a core's cache
_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: the increment of splitmix64
_MASK = 2**64 - 1


def checksum(tensor: Tensor) -> int:
    """Sum of 32-bit words times the 64-bit weights of their positions, modulo 2^64, in [0, 2^64).

    The bytes are those of the contiguous tensor, padded with zeros to whole words; their number counts too. The low
    half of word i's weight is 2i + 1, so changing any one word or swapping any two is certain to change the sum (below
    2^31 words). The high half is pseudo-random, so other damage goes unseen only by a rare chance. It guards against
    faults, not against forgers. All arithmetic is on integers: the order of summation has no effect.
    """
    data = tensor.detach().contiguous().flatten().view(torch.uint8)
    run = function("penstock_checksum", "pq") if data.device.type == "cpu" else None
    if run is None:
        return reference(data)
    run.restype = ctypes.c_uint64  # type: ignore[attr-defined]
    return int(run(data.data_ptr(), data.numel()))


def reference(data: Tensor) -> int:
    """The same in torch, on any device. data: [N] uint8."""
    num_bytes = data.numel()
    if num_bytes % 4 or data.storage_offset() % 4:
        data = torch.cat((data, data.new_zeros(-num_bytes % 4)))
    words = data.view(torch.int32)
    weights = _weights(str(data.device))
    num_chunks, num_left = divmod(words.numel(), _CHUNK)
    total = num_bytes * _GOLDEN
    if num_chunks:
        total += _sum_chunks(words[: num_chunks * _CHUNK].view(num_chunks, _CHUNK), weights, 0)
    if num_left:
        total += _sum_chunks(words[num_chunks * _CHUNK :].view(1, num_left), weights[:num_left], num_chunks)
    return total & _MASK


def _sum_chunks(chunks: Tensor, weights: Tensor, first: int) -> int:
    """Weighted sum of chunks [first, first + N). chunks: [N, W] int32; weights: [W] int64.

    Word j of chunk c weighs `weights[j] * (1 + 2^32 G c) + 2 _CHUNK c`, with G odd: a chunk's own two sums are enough,
    and the low half runs on from chunk to chunk.
    """
    if chunks.is_cuda:
        wide = chunks.to(torch.int64)
        sums = torch.stack(((wide * weights).sum(dim=1), wide.sum(dim=1)), dim=1).tolist()
    else:  # torch.dot makes one pass and no tensor of products
        sums = [
            (int(torch.dot(wide, weights)), int(wide.sum())) for wide in (chunk.to(torch.int64) for chunk in chunks)
        ]
    return sum(
        dot * (1 + (_GOLDEN * c << 32)) + plain * (2 * _CHUNK * c) for c, (dot, plain) in enumerate(sums, start=first)
    )


@lru_cache(maxsize=16)
def _weights(device: str) -> Tensor:
    """[_CHUNK] int64: low half 2j + 1, high half from splitmix64 (Steele, Lea & Flood, 2014)."""
    index = np.arange(_CHUNK, dtype=np.uint64)
    z = (index + np.uint64(1)) * np.uint64(_GOLDEN)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z = z ^ (z >> np.uint64(31))
    mixed = (z >> np.uint64(32) << np.uint64(32)) | (np.uint64(2) * index + np.uint64(1))
    return torch.from_numpy(mixed.view(np.int64)).to(device)
