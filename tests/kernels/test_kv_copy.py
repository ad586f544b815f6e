"""Payloads of KV leave the cache, and return to it, as the torch reference has them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import kv_copy
from kernels.checksum import checksum
from kernels.kv_copy import Heads, gather_kv, scatter_kv_
from kernels.paged_kv import LayerKV, PagedLatent, empty_kv, token_views, zeros

CPU = torch.device("cpu")
NUM_BLOCKS = 6


def cache(kind: str, num_heads: int, head_size: int, block_size: int) -> LayerKV:
    """Filled with any bytes."""
    if kind == "latent":
        kv: LayerKV = PagedLatent(zeros((NUM_BLOCKS, block_size, head_size), torch.bfloat16, CPU))
    else:
        kv = empty_kv(NUM_BLOCKS, num_heads, head_size, block_size, getattr(torch, kind), CPU)
    for part in kv:
        if part is not None:
            raw = part.view(torch.uint8)
            raw.copy_(torch.randint(256, raw.shape, dtype=torch.uint8))
    return kv


def data(kv: LayerKV) -> list[torch.Tensor]:
    return [part.view(torch.uint8).clone() for part in kv if part is not None]


def num_bytes(kv: LayerKV, num_tokens: int, heads: Heads) -> int:
    views = token_views(kv) if isinstance(kv, PagedLatent) else [view[:, :, slice(*heads)] for view in token_views(kv)]
    return num_tokens * sum(view[0, 0].numel() * view.element_size() for view in views)


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(["float32", "bfloat16", "float16", "int8", "latent"]),
    heads=st.tuples(st.integers(0, 2), st.integers(1, 3)).filter(lambda pair: pair[0] < pair[1]),
    head_size=st.sampled_from([2, 6, 16, 40, 64]),
    block_size=st.sampled_from([1, 3, 8, 16, 33]),
    span=st.tuples(st.integers(0, 70), st.integers(0, 70)),
    table=st.permutations(range(NUM_BLOCKS)),
    by_blocks=st.booleans(),
    stream_bytes=st.sampled_from([0, 1 << 20]),
)
def test_both_ways_equal_the_reference(
    kind: str,
    heads: Heads,
    head_size: int,
    block_size: int,
    span: tuple[int, int],
    table: list[int],
    by_blocks: bool,
    stream_bytes: int,
) -> None:
    heads = (0, 1) if kind == "latent" else heads
    start, end = (min(each, NUM_BLOCKS * block_size) for each in sorted(span))
    source, target, expected = (cache(kind, 3, head_size, block_size) for _ in range(3))
    for ours, reference in zip(target, expected, strict=True):
        if ours is not None and reference is not None:
            ours.view(torch.uint8).copy_(reference.view(torch.uint8))
    payload = torch.empty(num_bytes(source, end - start, heads), dtype=torch.uint8)
    whole = torch.empty_like(payload)
    run = (table, start, end - start)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_copy, "function", lambda _name, _arguments: None)
        gather_kv(source, *run, whole, heads, by_blocks=by_blocks)
        scatter_kv_(expected, *run, whole, heads, by_blocks=by_blocks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_copy, "STREAM_BYTES", stream_bytes)
        assert gather_kv(source, *run, payload, heads, by_blocks=by_blocks) == checksum(whole)
        assert torch.equal(payload, whole)
        assert scatter_kv_(target, *run, payload, heads, by_blocks=by_blocks) == checksum(whole)
    assert all(map(torch.equal, data(target), data(expected)))


@pytest.mark.parametrize("kind", ["float32", "int8", "latent"])
def test_a_payload_by_blocks_is_the_blocks_of_the_cache_one_after_the_other(kind: str) -> None:
    heads, kv = (0, 1) if kind == "latent" else (1, 3), cache(kind, 3, 16, 4)
    payload = torch.empty(num_bytes(kv, 10, heads), dtype=torch.uint8)
    gather_kv(kv, (5, 2, 3), 2, 10, payload, heads, by_blocks=True)
    first = torch.empty(num_bytes(kv, 2, heads), dtype=torch.uint8)
    gather_kv(kv, (5,), 2, 2, first, heads)
    parts = [part if kind == "latent" else part[:, 1:3] for part in kv if part is not None]
    rest = [part[block].flatten().view(torch.uint8) for block in (2, 3) for part in parts]
    assert torch.equal(payload, torch.cat([first, *rest]))


@pytest.mark.parametrize("by_blocks", [False, True])
def test_a_large_payload_has_the_checksum_of_its_bytes(by_blocks: bool) -> None:
    """Parts of it begin in the middle of the checksum's chunks, and end in others."""
    kv = empty_kv(64, 3, 56, 16, torch.float32, CPU)
    for part in (kv.k, kv.v):
        part.copy_(torch.randn(part.shape))
    payload = torch.empty(num_bytes(kv, 1000, (0, 3)), dtype=torch.uint8)
    assert gather_kv(kv, range(64), 7, 1000, payload, (0, 3), by_blocks=by_blocks) == checksum(payload)
    assert scatter_kv_(kv, range(64), 7, 1000, payload, (0, 3), by_blocks=by_blocks) == checksum(payload)
