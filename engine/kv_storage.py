"""The memory of the KV cache, and the only way into it for other rooms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from core.errors import ConfigError, IntegrityError
from core.kv_layout import KVLayout
from kernels.paged_kv import LayerKV, PagedLatent, empty_kv, token_views


class KVStorage:
    """What all layers cache, in blocks: `layers[l]`.

    Which block belongs to whom is the `BlockPool`'s knowledge. Only the owner of a block writes it: the runner for the
    requests of a step, and whoever received KV for a request that is reserved. On a GPU both methods run on the current
    stream; a reader on another stream must wait for the writer's.

    A payload is [N] uint8: K [T, K, D], then V [T, K, D], then, where they are int8, their float32 scales [T, K] each;
    of the kind "latent", [T, D]. So its size is T K times the layout's bytes per cell, whatever the block size.
    """

    def __init__(self, layout: KVLayout, num_blocks: int, device: torch.device) -> None:
        self.layout = layout
        self.num_blocks = num_blocks
        self.device = device
        self.layers = tuple(_layer(layout, num_blocks, device) for _ in range(layout.num_layers))

    def read(
        self, layer: int, block_ids: Sequence[int], start: int, end: int, kv_heads: tuple[int, int] | None = None
    ) -> Tensor:
        """The payload of positions [start, end) of a request whose table is `block_ids`: a copy.

        `kv_heads`: the first of its heads and the one after the last; all of them where it is left out.
        """
        blocks, offset = self._blocks(block_ids, start, end)
        parts = [
            view.index_select(0, blocks).flatten(0, 1)[offset : offset + end - start].flatten().view(torch.uint8)
            for view in self._views(layer, kv_heads)
        ]
        return torch.cat(parts)

    def write(
        self,
        layer: int,
        block_ids: Sequence[int],
        start: int,
        end: int,
        payload: Tensor,
        kv_heads: tuple[int, int] | None = None,
    ) -> None:
        """Put a payload that `read` gave, here or on another worker, into positions [start, end) of `kv_heads`.

        `IntegrityError` where it is not one of so many tokens and heads, or the table does not cover them.
        """
        num_tokens = end - start
        blocks, offset = self._blocks(block_ids, start, end)
        first, last = kv_heads or (0, self.layout.num_kv_heads)
        expected = num_tokens * (last - first) * self.layout.bytes_per_cell
        if payload.dtype is not torch.uint8 or payload.shape != (expected,):
            raise IntegrityError(f"payload is {payload.dtype} {list(payload.shape)}, must be uint8 [{expected}]")
        block_size = self.layout.block_size
        places = torch.arange(offset, offset + num_tokens, device=self.device)
        index = blocks[places // block_size], places % block_size
        views = self._views(layer, kv_heads)
        sizes = [num_tokens * view[0, 0].numel() * view.element_size() for view in views]
        for view, part in zip(views, torch.split(payload.to(self.device), sizes), strict=True):
            view.index_put_(index, _as(part, view.dtype).view(num_tokens, *view.shape[2:]))

    def _views(self, layer: int, kv_heads: tuple[int, int] | None) -> tuple[Tensor, ...]:
        """Views [B, S, ...] of a layer, of some of its heads."""
        views = token_views(self.layers[layer])
        if kv_heads is None or kv_heads == (0, self.layout.num_kv_heads):
            return views
        first, last = kv_heads
        if not 0 <= first < last <= self.layout.num_kv_heads:
            raise IntegrityError(f"KV heads [{first}, {last}) are not within {self.layout.num_kv_heads}")
        return tuple(view[:, :, first:last] for view in views)

    def _blocks(self, block_ids: Sequence[int], start: int, end: int) -> tuple[Tensor, int]:
        """The blocks [N] int64 that hold [start, end), and where in the first of them it begins."""
        block_size = self.layout.block_size
        first, last = start // block_size, -(-end // block_size)
        if not 0 <= start <= end or last > len(block_ids):
            raise IntegrityError(f"positions [{start}, {end}) are not within {len(block_ids)} blocks of {block_size}")
        blocks = torch.tensor(block_ids[first:last], dtype=torch.int64, device=self.device)
        return blocks, start - first * block_size


def _layer(layout: KVLayout, num_blocks: int, device: torch.device) -> LayerKV:
    dtype = getattr(torch, layout.dtype)
    if layout.kind == "heads":
        return empty_kv(num_blocks, layout.num_kv_heads, layout.head_size, layout.block_size, dtype, device)
    if layout.dtype == "int8":
        raise ConfigError("engine.kv_cache_dtype", "int8", "can't hold the latent cache of MLA; use bfloat16")
    return PagedLatent(torch.zeros(num_blocks, layout.block_size, layout.head_size, dtype=dtype, device=device))


def _as(payload: Tensor, dtype: torch.dtype) -> Tensor:
    """The bytes as elements of `dtype`; copied where they are not aligned."""
    if payload.storage_offset() % dtype.itemsize:
        payload = payload.clone()
    return payload.view(dtype)
