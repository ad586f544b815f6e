"""The measure of K and V rounded on the wire sees what it should."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kv_wire import NUM_OUTPUT, row
from benchmarks.perplexity import held_out_texts
from core.kv_layout import KVLayout, WireDtype


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return [text[:40] for text in held_out_texts(2)]


def test_it_counts_bytes_and_tokens(prompts: list[list[int]]) -> None:
    found = row("float32", prompts)
    assert (found.num_requests, found.num_tokens) == (2, 2 * NUM_OUTPUT)
    assert found.bytes_ratio == round((32 + 4) / (4 * 32), 4)
    assert found.max_gap < 0.1


def test_it_notices_damage(prompts: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(payload: torch.Tensor, cache: KVLayout, dtype: WireDtype) -> torch.Tensor:
        return payload if dtype == "auto" else torch.zeros_like(payload)

    for name in ("to_wire", "from_wire"):
        monkeypatch.setattr(f"benchmarks.kv_wire.{name}", lost)
    found = row("float32", prompts)
    assert found.num_diverged == 2
    assert found.max_gap > 0.5
