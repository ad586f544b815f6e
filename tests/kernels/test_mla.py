"""Attention over the compressed latent against its definition."""

import pytest
import torch

from kernels.mla import mla_attention
from kernels.native import library
from kernels.paged_kv import PagedLatent, Spans
from tests.kernels.paged_cache import NAN, make_spans

STEP = [(1, 8, 1), (0, 0, 1), (2, 0, 13), (3, 17, 9), (4, 1200, 2)]
SHAPES = [(4, 32, 8, 16), (3, 10, 6, 3), (16, 64, 16, 32), (70, 16, 4, 16)]
"""Heads, latent size, rotary size, block size."""


def latents(
    size: int, block_size: int, dtype: torch.dtype, rng: torch.Generator
) -> tuple[PagedLatent, Spans, list[torch.Tensor]]:
    """A cache that holds the contexts of STEP and not-a-number, the step's spans, and the contexts, [C, R + P]."""
    lens = [start + n for _, start, n in STEP]
    counts = [-(-length // block_size) for length in lens]
    order = torch.randperm(sum(counts) + 1, generator=rng, device=rng.device)[:-1]
    tables = torch.split(order, counts)
    cache = torch.full((len(order) + 1, block_size, size), NAN, device=rng.device).to(dtype)
    dense = []
    for table, length in zip(tables, lens, strict=True):
        at = torch.arange(length, device=rng.device)
        dense.append(torch.randn(length, size, generator=rng, device=rng.device).to(dtype).float())
        cache[table[at // block_size], at % block_size] = dense[-1].to(dtype)
    spans = make_spans([(table, start, n) for table, (_, start, n) in zip(tables, STEP, strict=True)])
    return PagedLatent(cache), spans, dense


@pytest.fixture(params=["chosen", "reference"])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "reference":
        monkeypatch.setattr("kernels.mla.native_attention", lambda *_: None)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_heads", "latent_size", "rope_size", "block_size"), SHAPES)
def test_all_heads_attend_to_one_latent(
    num_heads: int, latent_size: int, rope_size: int, block_size: int, dtype: torch.dtype, rng: torch.Generator
) -> None:
    kv, spans, dense = latents(latent_size + rope_size, block_size, dtype, rng)
    num_rows = sum(n for _, _, n in STEP)
    q = torch.randn(num_rows, num_heads, latent_size + rope_size, generator=rng, device=rng.device)
    out = mla_attention(q, kv, spans, scale=0.3, rank=latent_size)
    row = 0
    for context, (_, start, n) in zip(dense, STEP, strict=True):
        for at in range(start, start + n):
            seen = context[: at + 1].double()
            weights = (q[row].double() @ seen.t() * 0.3).softmax(dim=-1)
            expected = (weights @ seen[:, :latent_size]).float()
            torch.testing.assert_close(out[row].view(num_heads, -1), expected, rtol=1e-5, atol=1e-5)
            row += 1


@pytest.mark.skipif(library() is None, reason="the torch reference makes no such promise")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_depends_on_no_other(dtype: torch.dtype, rng: torch.Generator) -> None:
    kv, spans, _ = latents(40, 16, dtype, rng)
    q = torch.randn(sum(n for _, _, n in STEP), 5, 40, generator=rng, device=rng.device)
    together = mla_attention(q, kv, spans, scale=0.3, rank=32)
    for row_start, num_rows, start, offset in spans.host_table.tolist():
        for i in range(num_rows):
            table = torch.tensor([[0, 1, start + i, offset]], dtype=torch.int32)
            alone = mla_attention(q[row_start + i :][:1], kv, Spans(table, spans.blocks, table), scale=0.3, rank=32)
            assert torch.equal(alone[0], together[row_start + i])
