"""Paged attention against plain softmax attention over a dense copy of the context."""

import math
from itertools import accumulate

import pytest
import torch

from kernels.paged_attention import MAX_GATHERED_BYTES, decode_attention, prefill_attention

BLOCK_SIZE = 4
SHAPES = [(4, 4, 8), (6, 2, 16), (5, 1, 24)]
"""Query heads, KV heads, head size."""


def by_definition(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """One query [H, D] over contexts k, v [S, K, D], in float64."""
    group = q.shape[0] // k.shape[1]
    out = []
    for head, query in enumerate(q.double()):
        keys, values = k[:, head // group].double(), v[:, head // group].double()
        out.append((keys @ query / math.sqrt(q.shape[1])).softmax(dim=0) @ values)
    return torch.stack(out).to(q.dtype)


class Cache:
    """Contexts scattered over blocks in random order; the rest of the cache is not-a-number."""

    def __init__(self, lens: list[int], num_kv_heads: int, head_size: int, rng: torch.Generator) -> None:
        self.num_blocks = [-(-length // BLOCK_SIZE) for length in lens]
        self.device = rng.device
        order = torch.randperm(sum(self.num_blocks), generator=rng, device=rng.device) + 1  # block 0 belongs to nobody
        ends = list(accumulate(self.num_blocks))
        self.tables = [order[end - n : end] for end, n in zip(ends, self.num_blocks, strict=True)]
        shape = (ends[-1] + 1, BLOCK_SIZE, 2, num_kv_heads, head_size)
        self.kv = torch.full(shape, float("nan"), device=rng.device)
        self.dense = [torch.randn(n, 2, num_kv_heads, head_size, generator=rng, device=rng.device) for n in lens]
        for table, dense in zip(self.tables, self.dense, strict=True):
            for position, token in enumerate(dense):
                self.kv[table[position // BLOCK_SIZE], position % BLOCK_SIZE] = token

    def padded_tables(self) -> torch.Tensor:
        tables = torch.zeros(len(self.tables), max(self.num_blocks), dtype=torch.int64, device=self.device)
        for row, table in zip(tables, self.tables, strict=True):
            row[: len(table)] = table
        return tables


@pytest.mark.parametrize("lens", [[1], [9], [1, 2, 3, 4, 5, 8, 9, 31], [16] * 3])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_size"), SHAPES)
def test_decode(
    lens: list[int], num_heads: int, num_kv_heads: int, head_size: int, device: torch.device, rng: torch.Generator
) -> None:
    cache = Cache(lens, num_kv_heads, head_size, rng)
    q = torch.randn(len(lens), num_heads, head_size, generator=rng, device=device)
    out = decode_attention(q, cache.kv, cache.padded_tables(), torch.tensor(lens, device=device), max(lens))
    expected = torch.stack([by_definition(q[i], kv[:, 0], kv[:, 1]) for i, kv in enumerate(cache.dense)])
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(("start", "num_tokens"), [(0, 1), (0, 4), (0, 13), (3, 2), (4, 9), (17, 1), (30, 7)])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_size"), SHAPES)
def test_prefill(
    start: int,
    num_tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    device: torch.device,
    rng: torch.Generator,
) -> None:
    cache = Cache([start + num_tokens], num_kv_heads, head_size, rng)
    q = torch.randn(num_tokens, num_heads, head_size, generator=rng, device=device)
    out = prefill_attention(q, cache.kv, cache.tables[0], start)
    kv = cache.dense[0]
    expected = [by_definition(q[i], kv[: start + i + 1, 0], kv[: start + i + 1, 1]) for i in range(num_tokens)]
    torch.testing.assert_close(out, torch.stack(expected))


def test_a_row_does_not_depend_on_its_neighbours(device: torch.device, rng: torch.Generator) -> None:
    cache = Cache([5, 30, 12], 2, 16, rng)
    q = torch.randn(3, 6, 16, generator=rng, device=device)
    lens = torch.tensor([5, 30, 12], device=device)
    together = decode_attention(q, cache.kv, cache.padded_tables(), lens, 30)
    for i, table in enumerate(cache.tables):
        alone = decode_attention(q[i : i + 1], cache.kv, table[None], lens[i : i + 1], int(lens[i]))
        torch.testing.assert_close(together[i : i + 1], alone)


def test_rows_may_be_gathered_in_pieces(
    device: torch.device, rng: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    lens = [5, 30, 12, 1, 31, 8, 17]
    cache = Cache(lens, 2, 16, rng)
    q = torch.randn(7, 6, 16, generator=rng, device=device)
    arguments = (q, cache.kv, cache.padded_tables(), torch.tensor(lens, device=device), 31)
    whole = decode_attention(*arguments)
    for num_rows in (0.5, 1, 3):
        row_bytes = 8 * BLOCK_SIZE * 2 * 2 * 16 * 4
        monkeypatch.setitem(MAX_GATHERED_BYTES, device.type, int(num_rows * row_bytes))
        torch.testing.assert_close(decode_attention(*arguments), whole)


def test_the_cache_is_only_read(device: torch.device, rng: torch.Generator) -> None:
    cache = Cache([5, 30], 2, 16, rng)
    before = cache.kv.clone()
    lens = torch.tensor([5, 30], device=device)
    decode_attention(torch.randn(2, 6, 16, generator=rng, device=device), cache.kv, cache.padded_tables(), lens, 30)
    assert torch.equal(cache.kv.nan_to_num(7.0), before.nan_to_num(7.0))
