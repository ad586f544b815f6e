"""On CPU a row of attention is the same, bit for bit, whatever is computed beside it and however its context is cut."""

import random
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch

from kernels.native import library
from kernels.paged_attention import PagedAttention
from kernels.threads import num_threads, set_num_threads
from tests.kernels.paged_cache import Cache

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]
LENS = [1, 64, 65, 200, 2300]
NUM_HEADS, NUM_KV_HEADS = 6, 2
OPTIONS: list[dict[str, Any]] = [{}, {"window": 90}, {"softcap": 3.0, "sinks": torch.linspace(-1, 1, NUM_HEADS)}]

pytestmark = pytest.mark.skipif(library() is None, reason="the torch reference makes no such promise")


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = num_threads()
    yield
    set_num_threads(before)


@pytest.fixture(params=[*((dtype, 48) for dtype in DTYPES), (torch.float32, 40), (torch.int8, 40)], ids=str)
def cache(request: pytest.FixtureRequest) -> Cache:
    """Of 48 elements a tile can read the cache where it lies, of 40 it can't."""
    dtype, head_size = request.param
    return Cache(LENS, NUM_KV_HEADS, head_size, torch.Generator().manual_seed(0), block_size=16, dtype=dtype)


@pytest.fixture
def q(cache: Cache) -> list[torch.Tensor]:
    """Of all positions of each context."""
    rng = torch.Generator().manual_seed(1)
    return [torch.randn(length, NUM_HEADS, cache.kv.k.shape[2], generator=rng) for length in LENS]


def attend(
    cache: Cache, q: list[torch.Tensor], parts: list[tuple[int, int, int]], options: dict[str, Any]
) -> list[torch.Tensor]:
    """Rows [start, start + n) of context i for each (i, start, n)."""
    rows = torch.cat([q[i][start : start + n] for i, start, n in parts])
    out = PagedAttention(0.2, **options)(rows, cache.kv, cache.spans(parts))
    return list(torch.split(out, [n for _, _, n in parts]))


def whole(cache: Cache, q: list[torch.Tensor], options: dict[str, Any]) -> list[torch.Tensor]:
    """All rows of all contexts in one step, on one thread."""
    set_num_threads(1)
    return attend(cache, q, [(i, 0, length) for i, length in enumerate(LENS)], options)


@pytest.mark.parametrize("options", OPTIONS, ids=[", ".join(options) or "plain" for options in OPTIONS])
def test_rows_alone_and_in_chunks_are_rows_of_the_whole(cache: Cache, q: Any, options: dict[str, Any]) -> None:
    expected, rng = whole(cache, q, options), random.Random(0)
    for i, length in enumerate(LENS):
        cuts = sorted({0, length, *(rng.randrange(length) for _ in range(6))})
        for start, end in pairwise(cuts):
            (chunk,) = attend(cache, q, [(i, start, end - start)], options)
            assert torch.equal(chunk, expected[i][start:end])
    rows = [(i, rng.randrange(length), 1) for i, length in enumerate(LENS) for _ in range(8)]
    for (i, at, _), row in zip(rows, attend(cache, q, rows, options), strict=True):
        assert torch.equal(row[0], expected[i][at])


@pytest.mark.parametrize("block_size", [16, 32, 7])
def test_where_and_in_what_blocks_a_context_lies_has_no_effect(cache: Cache, q: Any, block_size: int) -> None:
    moved = cache.moved(torch.Generator().manual_seed(5), block_size)
    parts = [(i, max(0, length - 70), min(length, 70)) for i, length in enumerate(LENS)]
    for a, b in zip(attend(cache, q, parts, {}), attend(moved, q, parts, {}), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("options", OPTIONS[:2], ids=["plain", "window"])
def test_more_threads_than_heads_share_a_context_without_effect(cache: Cache, q: Any, options: dict[str, Any]) -> None:
    expected = whole(cache, q, options)
    for count in (2, 5):
        set_num_threads(count)
        for n in (1, 20):
            (rows,) = attend(cache, q, [(4, LENS[4] - n, n)], options)
            assert torch.equal(rows, expected[4][-n:])
