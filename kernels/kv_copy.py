"""Payloads of KV, out of the paged cache and back, each with its checksum.

A payload is [N] uint8: K [T, K, D], then V [T, K, D], then, where they are int8, their float32 scales [T, K] each; of a
latent cache [T, R + P]. So its size is T times what a token takes, whatever the block size. A payload *by blocks* has
the same bytes in another order, for caches with blocks of the same size: all of one block after all of the one before,
and of a block that is whole, what the cache holds of it as it stands there.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.checksum import checksum
from kernels.native import function
from kernels.paged_kv import LayerKV, PagedKV, PagedLatent, token_views

Heads = tuple[int, int]
"""The first of the KV heads that a payload holds, and the one after the last."""


STREAM_BYTES = 1 << 20
"""From this size on, what is scattered by blocks goes past the caches, which would not hold it until it is read."""


class Arguments(ctypes.Structure):
    """`KVCopyArguments` of csrc/kv_copy.cpp."""

    _fields_ = (
        ("k", ctypes.c_void_p),
        ("v", ctypes.c_void_p),
        ("k_scale", ctypes.c_void_p),
        ("v_scale", ctypes.c_void_p),
        ("blocks", ctypes.c_void_p),
        ("payload", ctypes.c_void_p),
        ("start", ctypes.c_int64),
        ("num_tokens", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("head_size", ctypes.c_int64),
        ("num_heads", ctypes.c_int64),
        ("first_head", ctypes.c_int64),
        ("num_cache_heads", ctypes.c_int64),
        ("item_bytes", ctypes.c_int32),
        ("parallel", ctypes.c_int32),
        ("by_blocks", ctypes.c_int32),
        ("past_caches", ctypes.c_int32),
    )


def gather_kv(
    kv: LayerKV,
    blocks: Sequence[int],
    start: int,
    num_tokens: int,
    out: Tensor,
    heads: Heads,
    *,
    by_blocks: bool = False,
) -> int:
    """Copy `num_tokens` tokens into `out`, a payload; returns its checksum.

    start: position of the first, counted from the first of `blocks`. For the engine's thread: the pool's help.
    """
    if (run := _native("penstock_kv_gather", kv, out)) is not None:
        return _run(run, kv, blocks, start, num_tokens, out, heads, by_blocks=by_blocks, parallel=True)
    parts = []
    for span, whole in _spans(kv, start, num_tokens, by_blocks=by_blocks):
        index = _places(kv, blocks, *span)
        if whole:
            numbers = index[0][:: token_views(kv)[0].shape[1]]
            rows = [part[numbers].flatten(1).view(torch.uint8) for part in _parts(kv, heads)]
            parts.append(torch.cat(rows, dim=1).flatten())
        else:
            parts += [view[index].flatten().view(torch.uint8) for view in _views(kv, heads)]
    torch.cat(parts, out=out)
    return checksum(out)


def scatter_kv_(
    kv: LayerKV,
    blocks: Sequence[int],
    start: int,
    num_tokens: int,
    payload: Tensor,
    heads: Heads,
    *,
    by_blocks: bool = False,
) -> int:
    """Put what `gather_kv` copied into the cache; returns the checksum of what was put. For any one thread."""
    if (run := _native("penstock_kv_scatter", kv, payload)) is not None:
        return _run(run, kv, blocks, start, num_tokens, payload, heads, by_blocks=by_blocks, parallel=False)
    payload, offset = payload.to(kv[0].device), 0
    for span, whole in _spans(kv, start, num_tokens, by_blocks=by_blocks):
        index, views = _places(kv, blocks, *span), _views(kv, heads)
        sizes = [span[1] * view[0, 0].numel() * view.element_size() for view in views]
        piece = payload[offset : offset + sum(sizes)]
        offset += sum(sizes)
        if whole:
            numbers = index[0][:: views[0].shape[1]]
            rows = torch.split(piece.view(len(numbers), -1), [size // len(numbers) for size in sizes], dim=1)
            for part, row in zip(_parts(kv, heads), rows, strict=True):
                part[numbers] = _as(row.flatten(), part.dtype).view(len(numbers), *part.shape[1:])
            continue
        for view, plane in zip(views, torch.split(piece, sizes), strict=True):
            view.index_put_(index, _as(plane, view.dtype).view(span[1], *view.shape[2:]))
    return checksum(payload)


def _native(name: str, kv: LayerKV, payload: Tensor) -> Callable[..., Any] | None:
    if kv[0].device.type != "cpu" or payload.device.type != "cpu":
        return None
    assert payload.is_contiguous()
    assert all(part is None or part.is_contiguous() for part in kv), "a view of a cache instead of a cache"
    run = function(name, "p")
    if run is not None:
        run.restype = ctypes.c_uint64  # type: ignore[attr-defined]
    return run


def _run(
    run: Callable[..., Any],
    kv: LayerKV,
    blocks: Sequence[int],
    start: int,
    num_tokens: int,
    payload: Tensor,
    heads: Heads,
    *,
    by_blocks: bool,
    parallel: bool,
) -> int:
    if isinstance(kv, PagedKV):
        _, num_cache_heads, head_size, block_size = kv.k.shape
        pointers = [None if part is None else part.data_ptr() for part in kv]
    else:
        _, block_size, head_size = kv.latent.shape
        num_cache_heads, pointers = 1, [None, kv.latent.data_ptr(), None, None]
    table = (ctypes.c_int32 * len(blocks))(*blocks)
    arguments = Arguments(
        *pointers,
        ctypes.addressof(table),
        payload.data_ptr(),
        start,
        num_tokens,
        block_size,
        head_size,
        heads[1] - heads[0],
        heads[0],
        num_cache_heads,
        kv[0].element_size(),
        int(parallel),
        int(by_blocks),
        int(payload.numel() >= STREAM_BYTES),
    )
    return int(run(ctypes.byref(arguments)))


def _views(kv: LayerKV, heads: Heads) -> tuple[Tensor, ...]:
    """Views [B, S, ...] of those heads."""
    views = token_views(kv)
    return views if isinstance(kv, PagedLatent) else tuple(view[:, :, heads[0] : heads[1]] for view in views)


def _parts(kv: LayerKV, heads: Heads) -> list[Tensor]:
    """Views [B, ...] of all that a cache holds of those heads, as it stands there."""
    parts = [part for part in kv if part is not None]
    return parts if isinstance(kv, PagedLatent) else [part[:, heads[0] : heads[1]] for part in parts]


def _spans(kv: LayerKV, start: int, num_tokens: int, *, by_blocks: bool) -> list[tuple[tuple[int, int], bool]]:
    """In order, what is copied as tokens, and what as whole blocks: `((start, tokens), whole)`."""
    block_size, end = token_views(kv)[0].shape[1], start + num_tokens
    first, last = -(-start // block_size) * block_size, end // block_size * block_size
    if not (by_blocks and num_tokens) or first > last:  # the last: all within one block
        return [((start, num_tokens), False)]
    spans = [((start, first - start), False), ((first, last - first), True), ((last, end - last), False)]
    return [(span, whole) for span, whole in spans if span[1]]


def _places(kv: LayerKV, blocks: Sequence[int], start: int, num_tokens: int) -> tuple[Tensor, Tensor]:
    """`(block, offset)` of each token, [T] int64 each."""
    device, block_size = kv[0].device, token_views(kv)[0].shape[1]
    places = torch.arange(start, start + num_tokens, device=device)
    return torch.tensor(blocks, dtype=torch.int64, device=device)[places // block_size], places % block_size


def _as(payload: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes as elements of `dtype`; copied where they are not aligned."""
    if payload.storage_offset() % dtype.itemsize:
        payload = payload.clone()
    return payload.view(dtype)
