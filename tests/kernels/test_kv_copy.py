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
)
def test_both_ways_equal_the_reference(
    kind: str, heads: Heads, head_size: int, block_size: int, span: tuple[int, int], table: list[int]
) -> None:
    heads = (0, 1) if kind == "latent" else heads
    start, end = (min(each, NUM_BLOCKS * block_size) for each in sorted(span))
    source, target, expected = (cache(kind, 3, head_size, block_size) for _ in range(3))
    for ours, reference in zip(target, expected, strict=True):
        if ours is not None and reference is not None:
            ours.view(torch.uint8).copy_(reference.view(torch.uint8))
    payload = torch.empty(num_bytes(source, end - start, heads), dtype=torch.uint8)
    whole = torch.empty_like(payload)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_copy, "function", lambda _name, _arguments: None)
        gather_kv(source, table, start, end - start, whole, heads)
        scatter_kv_(expected, table, start, end - start, whole, heads)
    assert gather_kv(source, table, start, end - start, payload, heads) == checksum(whole)
    assert torch.equal(payload, whole)
    assert scatter_kv_(target, table, start, end - start, payload, heads) == checksum(whole)
    assert all(map(torch.equal, data(target), data(expected)))


def test_a_large_payload_has_the_checksum_of_its_bytes() -> None:
    """Parts of it begin in the middle of the checksum's chunks, and end in others."""
    kv = empty_kv(64, 3, 56, 16, torch.float32, CPU)
    for part in (kv.k, kv.v):
        part.copy_(torch.randn(part.shape))
    payload = torch.empty(num_bytes(kv, 1000, (0, 3)), dtype=torch.uint8)
    assert gather_kv(kv, range(64), 7, 1000, payload, (0, 3)) == checksum(payload)
    assert scatter_kv_(kv, range(64), 7, 1000, payload, (0, 3)) == checksum(payload)
