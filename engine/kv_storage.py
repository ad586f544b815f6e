"""The memory of the KV cache, and the only way into it for other rooms."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from core.errors import IntegrityError
from core.kv_layout import KVLayout


class KVStorage:
    """K and V of all layers in blocks: `layers[l]` is [num_blocks, block_size, 2, K, D].

    Which block belongs to whom is the `BlockPool`'s knowledge. Only the owner of a block writes it: the runner for the
    requests of a step, and whoever received KV for a request that is reserved. On a GPU both methods run on the current
    stream; a reader on another stream must wait for the writer's.
    """

    def __init__(self, layout: KVLayout, num_blocks: int, device: torch.device) -> None:
        self.layout = layout
        shape = (layout.num_layers, num_blocks, layout.block_size, 2, layout.num_kv_heads, layout.head_size)
        self.layers = torch.zeros(shape, dtype=getattr(torch, layout.dtype), device=device).unbind(0)

    @property
    def num_blocks(self) -> int:
        return self.layers[0].shape[0]

    @property
    def device(self) -> torch.device:
        return self.layers[0].device

    def read(self, layer: int, block_ids: Sequence[int], start: int, end: int) -> Tensor:
        """A contiguous copy [2, T, K, D] of positions [start, end) of a request whose table is `block_ids`."""
        tokens = self._flat(layer).index_select(0, self._slots(block_ids, start, end))
        return tokens.transpose(0, 1).contiguous()

    def write(self, layer: int, block_ids: Sequence[int], start: int, end: int, payload: Tensor) -> None:
        """Put what `read` gave elsewhere into positions [start, end). payload: [2, T, K, D] of the layout's dtype."""
        expected = (2, end - start, self.layout.num_kv_heads, self.layout.head_size)
        if payload.shape != expected or payload.dtype != self.layers[0].dtype:
            raise IntegrityError(
                f"payload is {payload.dtype} {list(payload.shape)}, must be {self.layout.dtype} {expected}"
            )
        slots = self._slots(block_ids, start, end)
        self._flat(layer).index_copy_(0, slots, payload.to(self.device).transpose(0, 1))

    def _flat(self, layer: int) -> Tensor:
        """[num_blocks * block_size, 2, K, D]"""
        return self.layers[layer].flatten(0, 1)

    def _slots(self, block_ids: Sequence[int], start: int, end: int) -> Tensor:
        """[T] int64: where positions [start, end) lie; `IntegrityError` where the table does not cover them."""
        block_size = self.layout.block_size
        first, last = start // block_size, -(-end // block_size)
        if not 0 <= start <= end or last > len(block_ids):
            raise IntegrityError(f"positions [{start}, {end}) are not within {len(block_ids)} blocks of {block_size}")
        blocks = torch.tensor(block_ids[first:last], dtype=torch.int64, device=self.device)
        slots = (blocks * block_size).unsqueeze(1) + torch.arange(block_size, device=self.device)
        return slots.flatten()[start - first * block_size : end - first * block_size]
