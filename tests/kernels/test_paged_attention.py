"""Paged attention against plain softmax attention over a dense copy of the context."""

from typing import Any

import pytest
import torch

from kernels.paged_attention import MAX_GATHERED_BYTES, PagedAttention
from tests.kernels.paged_cache import Cache, by_definition

SHAPES = [(4, 4, 8, 4), (6, 2, 16, 16), (5, 1, 22, 3), (16, 1, 34, 16), (3, 3, 64, 32), (8, 2, 40, 24)]
"""Query heads, KV heads, head size, block size."""
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int8]
STEP = [(0, 0, 1), (1, 8, 1), (2, 29, 1), (3, 0, 13), (4, 17, 9), (5, 255, 2), (6, 100, 31), (7, 511, 1)]
"""(context, start, number of rows): decodes and chunks of all kinds in one step."""
OPTIONS: list[dict[str, Any]] = [
    {},
    {"scale": 0.3},
    {"window": 1},
    {"window": 7},
    {"window": 64},
    {"softcap": 2.5},
    {"sinks": True},
    {"window": 20, "softcap": 5.0, "sinks": True, "scale": 1.0},
]


def step_cache(num_kv_heads: int, head_size: int, rng: torch.Generator, **kwargs: Any) -> Cache:
    return Cache([start + num_rows for _, start, num_rows in STEP], num_kv_heads, head_size, rng, **kwargs)


def run(cache: Cache, q: torch.Tensor, parts: list[tuple[int, int, int]], **options: Any) -> torch.Tensor:
    return PagedAttention(**{"scale": q.shape[2] ** -0.5, **options})(q, cache.kv, cache.spans(parts))


@pytest.fixture(params=["chosen", "reference"], autouse=True)
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What this machine chooses, and what runs where there is no compiler."""
    if request.param == "reference":
        monkeypatch.setattr("kernels.paged_attention.native_attention", lambda *_: None)


def expected(cache: Cache, q: torch.Tensor, parts: list[tuple[int, int, int]], **options: Any) -> torch.Tensor:
    rows = [(i, start + n) for i, start, num_rows in parts for n in range(num_rows)]
    return torch.stack(
        [by_definition(q[t], cache.k[i][: at + 1], cache.v[i][: at + 1], **options) for t, (i, at) in enumerate(rows)]
    )


def queries(num_heads: int, head_size: int, rng: torch.Generator) -> torch.Tensor:
    num_rows = sum(n for _, _, n in STEP)
    return torch.randn(num_rows, num_heads, head_size, generator=rng, device=rng.device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_size", "block_size"), SHAPES)
def test_a_mixed_step(
    num_heads: int, num_kv_heads: int, head_size: int, block_size: int, dtype: torch.dtype, rng: torch.Generator
) -> None:
    cache = step_cache(num_kv_heads, head_size, rng, block_size=block_size, dtype=dtype)
    q = queries(num_heads, head_size, rng)
    torch.testing.assert_close(run(cache, q, STEP), expected(cache, q, STEP), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_windows_caps_and_sinks(options: dict[str, Any], rng: torch.Generator) -> None:
    cache, q = step_cache(2, 16, rng, block_size=16), 3 * queries(6, 16, rng)
    if "sinks" in options:
        options = {**options, "sinks": torch.randn(6, generator=rng, device=rng.device)}
    actual = run(cache, q, STEP, **options)
    torch.testing.assert_close(actual, expected(cache, q, STEP, **options), rtol=1e-5, atol=1e-5)


def test_long_contexts(rng: torch.Generator) -> None:
    parts = [(0, 2699, 1), (1, 1020, 9)]
    cache = Cache([2700, 1029], 1, 32, rng, block_size=16)
    q = torch.randn(10, 4, 32, generator=rng, device=rng.device)
    torch.testing.assert_close(run(cache, q, parts), expected(cache, q, parts), rtol=1e-5, atol=1e-5)


def test_spans_may_be_gathered_in_pieces(rng: torch.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, parts = Cache([17 + i for i in range(7)], 2, 16, rng), [(i, 16 + i, 1) for i in range(7)]
    q = torch.randn(7, 6, 16, generator=rng, device=rng.device)
    whole = run(cache, q, parts)
    for num_spans in (0.5, 1, 3):
        monkeypatch.setitem(MAX_GATHERED_BYTES, rng.device.type, int(num_spans * 8 * 4 * 2 * 2 * 16 * 4))
        torch.testing.assert_close(run(cache, q, parts), whole)


def test_the_cache_is_only_read(rng: torch.Generator) -> None:
    cache = Cache([5, 30], 2, 16, rng)
    before = [x.clone() for x in cache.kv if x is not None]
    run(cache, torch.randn(2, 6, 16, generator=rng, device=rng.device), [(0, 4, 1), (1, 29, 1)])
    after = [x for x in cache.kv if x is not None]
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(after, before, strict=True))


def test_one_layer_may_read_one_cache_after_the_other(rng: torch.Generator) -> None:
    attention = PagedAttention(16**-0.5)
    q = torch.randn(1, 6, 16, generator=rng, device=rng.device)
    for length in (40, 7, 40):
        cache, parts = Cache([length], 2, 16, rng, block_size=16), [(0, length - 1, 1)]
        out = attention(q, cache.kv, cache.spans(parts))
        torch.testing.assert_close(out, expected(cache, q, parts), rtol=1e-5, atol=1e-5)
