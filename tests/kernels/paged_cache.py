"""Contexts scattered over the blocks of a paged cache, and steps that read them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate

import torch

from kernels.paged_kv import Spans, empty_kv, token_views
from kernels.quantize import quantize_rows

NAN = float("nan")


class Cache:
    """Contexts over blocks in random order; the rest of the cache is not-a-number (int8: codes of any size, and scales
    that are not).

    `k[i]`, `v[i]`: [C, K, D] float32, what the cache holds of context i, so after rounding to `dtype`.
    """

    def __init__(
        self,
        lens: Sequence[int],
        num_kv_heads: int,
        head_size: int,
        rng: torch.Generator,
        *,
        block_size: int = 4,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.block_size = block_size
        num_blocks = [-(-length // block_size) for length in lens]
        order = torch.randperm(sum(num_blocks), generator=rng, device=rng.device) + 1  # block 0 belongs to nobody
        self.tables = [order[end - n : end] for end, n in zip(accumulate(num_blocks), num_blocks, strict=True)]
        self.kv = empty_kv(len(order) + 1, num_kv_heads, head_size, block_size, dtype, rng.device)
        self.poison()
        self.k, self.v = ([self._fill(i, n, which, rng) for i, n in enumerate(lens)] for which in (0, 1))

    def poison(self) -> None:
        for view in token_views(self.kv):
            view.fill_(NAN if view.is_floating_point() else 99)

    def _fill(self, i: int, length: int, which: int, rng: torch.Generator) -> torch.Tensor:
        """Random K or V of context i, written into its blocks; returns what the cache then holds."""
        view, scale = token_views(self.kv)[which], token_views(self.kv)[2 + which :][:1]
        x = torch.randn(length, *view.shape[2:], generator=rng, device=rng.device)
        index = self.places(i, length)
        if not scale:
            view[index] = x.to(view.dtype)
            return x.to(view.dtype).float()
        codes, scales = quantize_rows(x)
        view[index], scale[0][index] = codes, scales
        return codes * scales.unsqueeze(-1)

    def spans(self, parts: Sequence[tuple[int, int, int]]) -> Spans:
        """A step's rows: (context, start, number of rows) each."""
        return make_spans([(self.tables[i], start, num_rows) for i, start, num_rows in parts])

    def moved(self, rng: torch.Generator, block_size: int) -> Cache:
        """The same contexts in other blocks."""
        lens, num_kv_heads, head_size = [len(k) for k in self.k], self.kv.v.shape[1], self.kv.v.shape[3]
        other = Cache(lens, num_kv_heads, head_size, rng, block_size=block_size, dtype=self.kv.k.dtype)
        other.k, other.v = self.k, self.v
        for i, length in enumerate(lens):
            for new, old in zip(token_views(other.kv), token_views(self.kv), strict=True):
                new[other.places(i, length)] = old[self.places(i, length)]
        return other

    def places(self, i: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Block and offset of each position of context i, [length] each."""
        at = torch.arange(length, device=self.kv.k.device)
        return self.tables[i][at // self.block_size], at % self.block_size


def make_spans(parts: Sequence[tuple[torch.Tensor, int, int]]) -> Spans:
    """(block table, start, number of rows) each; a table may be longer than the context."""
    rows, rest, offset = [], 0, 0
    for table, start, num_rows in parts:
        rows.append((rest, num_rows, start, offset))
        rest, offset = rest + num_rows, offset + len(table)
    host = torch.tensor(rows, dtype=torch.int32)
    blocks = torch.cat([table for table, _, _ in parts]).to(torch.int32)
    return Spans(host.to(blocks.device), blocks, host)


def by_definition(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """One query [H, D] at the last position of a context k, v [C, K, D], in float64; returns [H D]."""
    group = q.shape[0] // k.shape[1]
    first = 0 if window is None else max(0, len(k) - window)
    out = []
    for head, query in enumerate(q.double()):
        logits = k[first:, head // group].double() @ query * (scale or 1 / math.sqrt(q.shape[1]))
        if softcap is not None:
            logits = softcap * (logits / softcap).tanh()
        if sinks is not None:
            logits = torch.cat((logits, sinks[head : head + 1].double()))
        weights = logits.softmax(dim=0)[: len(k) - first]
        out.append(weights @ v[first:, head // group].double())
    return torch.cat(out).to(q.dtype)
