"""The memory of the KV cache, and the only way into it for other rooms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from core.errors import ConfigError, IntegrityError
from core.kv_layout import KVLayout
from kernels.kv_copy import Heads, gather_kv, scatter_kv_
from kernels.paged_kv import LayerKV, PagedLatent, empty_kv, zeros


class KVStorage:
    """What all layers cache, in blocks: `layers[l]`.

    Which block belongs to whom is the `BlockPool`'s knowledge. Only the owner of a block writes it: the runner for the
    requests of a step, and whoever received KV for a request that is reserved. On a GPU both methods run on the current
    stream; a reader on another stream must wait for the writer's.

    A payload is as `kernels.kv_copy` describes it, so its size is T K times the layout's bytes per cell. `kv_heads` are
    the first of its heads and the one after the last; all of them where it is left out. One `by_blocks` is for a
    storage with blocks of the same size.
    """

    def __init__(self, layout: KVLayout, num_blocks: int, device: torch.device) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.device = device
        self.layers = tuple(_layer(layout, num_blocks, device) for _ in range(layout.num_layers))

    def read(self, layer: int, block_ids: Sequence[int], start: int, end: int, kv_heads: Heads | None = None) -> Tensor:
        """The payload of positions [start, end) of a request whose table is `block_ids`: a copy, [N] uint8."""
        heads = self._heads(kv_heads)
        payload = torch.empty(self._num_bytes(max(0, end - start), heads), dtype=torch.uint8, device=self.device)
        self.read_into(layer, block_ids, start, end, payload, heads)
        return payload

    def read_into(
        self,
        layer: int,
        block_ids: Sequence[int],
        start: int,
        end: int,
        out: Tensor,
        kv_heads: Heads | None = None,
        *,
        by_blocks: bool = False,
    ) -> int:
        """`read` into `out`, on this device; returns the payload's checksum."""
        blocks, offset = self._blocks(block_ids, start, end)
        heads = self._heads(kv_heads)
        self._check(out, end - start, heads)
        return gather_kv(self.layers[layer], blocks, offset, end - start, out, heads, by_blocks=by_blocks)

    def write(
        self,
        layer: int,
        block_ids: Sequence[int],
        start: int,
        end: int,
        payload: Tensor,
        kv_heads: Heads | None = None,
        *,
        by_blocks: bool = False,
    ) -> int:
        """Put a payload that was read, here or on another worker, into positions [start, end); returns its checksum.

        `IntegrityError` where it is not one of so many tokens and heads, or the table does not cover them.
        """
        blocks, offset = self._blocks(block_ids, start, end)
        heads = self._heads(kv_heads)
        self._check(payload, end - start, heads)
        return scatter_kv_(self.layers[layer], blocks, offset, end - start, payload, heads, by_blocks=by_blocks)

    def _num_bytes(self, num_tokens: int, heads: Heads) -> int:
        return num_tokens * (heads[1] - heads[0]) * self.layout.bytes_per_cell

    def _check(self, payload: Tensor, num_tokens: int, heads: Heads) -> None:
        expected = self._num_bytes(num_tokens, heads)
        if payload.dtype is not torch.uint8 or payload.shape != (expected,):
            raise IntegrityError(f"payload is {payload.dtype} {list(payload.shape)}, must be uint8 [{expected}]")

    def _heads(self, kv_heads: Heads | None) -> Heads:
        first, last = kv_heads or (0, self.layout.num_kv_heads)
        if not 0 <= first < last <= self.layout.num_kv_heads:
            raise IntegrityError(f"KV heads [{first}, {last}) are not within {self.layout.num_kv_heads}")
        return first, last

    def _blocks(self, block_ids: Sequence[int], start: int, end: int) -> tuple[Sequence[int], int]:
        """The blocks that hold [start, end), and where in the first of them it begins."""
        block_size = self.layout.block_size
        first, last = start // block_size, -(-end // block_size)
        if not 0 <= start <= end or last > len(block_ids):
            raise IntegrityError(f"positions [{start}, {end}) are not within {len(block_ids)} blocks of {block_size}")
        blocks = block_ids[first:last]
        if not all(0 <= block < self.num_blocks for block in blocks):
            raise IntegrityError(f"blocks {list(blocks)} are not all within {self.num_blocks}")
        return blocks, start - first * block_size


class HostKV:
    """Host memory for the K and V of parked requests, in blocks as the cache has them; pinned where that is on a GPU.

    Copied as it stands, so what comes back is what left, bit for bit. Called before a step, on the engine's thread;
    both return when the copy is made. On a CPU a block takes memory once it is first used.
    """

    def __init__(self, storage: KVStorage, num_blocks: int) -> None:
        self.num_blocks, self._device = num_blocks, storage.device
        pairs = [(part, self._like(part, num_blocks)) for layer in storage.layers for part in layer if part is not None]
        self._pairs: Sequence[tuple[Tensor, Tensor]] = pairs  # [B, ...] of the cache and of host memory

    def take_out(self, block_ids: Sequence[int], host_block_ids: Sequence[int]) -> None:
        for first, last in _runs(host_block_ids):
            index = torch.tensor(block_ids[first:last], device=self._device)
            start, end = host_block_ids[first], host_block_ids[last - 1] + 1
            for part, host in self._pairs:
                host[start:end].copy_(part.index_select(0, index), non_blocking=True)
        self._wait()

    def put_back(self, block_ids: Sequence[int], host_block_ids: Sequence[int]) -> None:
        for first, last in _runs(host_block_ids):
            index = torch.tensor(block_ids[first:last], device=self._device)
            start, end = host_block_ids[first], host_block_ids[last - 1] + 1
            for part, host in self._pairs:
                part.index_copy_(0, index, host[start:end].to(self._device, non_blocking=True))
        self._wait()

    def _like(self, part: Tensor, num_blocks: int) -> Tensor:
        shape = (num_blocks, *part.shape[1:])
        if self._device.type == "cpu":
            return zeros(shape, part.dtype, self._device)
        return torch.empty(shape, dtype=part.dtype, pin_memory=True)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()


def _runs(ids: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Spans [first, last) of consecutive numbers."""
    first = 0
    for i in range(1, len(ids) + 1):
        if i == len(ids) or ids[i] != ids[i - 1] + 1:
            yield first, i
            first = i


def _layer(layout: KVLayout, num_blocks: int, device: torch.device) -> LayerKV:
    dtype = getattr(torch, layout.dtype)
    if layout.kind == "heads":
        return empty_kv(num_blocks, layout.num_kv_heads, layout.head_size, layout.block_size, dtype, device)
    if layout.dtype == "int8":
        raise ConfigError("engine.kv_cache_dtype", "int8", "can't hold the latent cache of MLA; use bfloat16")
    return PagedLatent(zeros((num_blocks, layout.block_size, layout.head_size), dtype, device))
