"""Routing and experts against a loop over tokens."""

import pytest
import torch
from torch.nn import functional as F

from kernels.moe import moe_experts, route


def by_definition(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    out = torch.zeros_like(x, dtype=torch.float64)
    for t in range(x.shape[0]):
        for weight, e in zip(weights[t].tolist(), ids[t].tolist(), strict=True):
            gate, up = (gate_up[e].double() @ x[t].double()).chunk(2)
            out[t] += weight * (down[e].double() @ (F.silu(gate) * up))
    return out.to(x.dtype)


@pytest.mark.parametrize("renormalize", [True, False])
def test_routes_are_the_best_of_a_softmax(renormalize: bool, device: torch.device, rng: torch.Generator) -> None:
    logits = torch.randn(40, 8, generator=rng, device=device)
    weights, ids = route(logits, 3, renormalize)
    probabilities = logits.softmax(dim=-1)
    for t in range(40):
        best = sorted(range(8), key=lambda e: -float(probabilities[t, e]))[:3]
        total = float(probabilities[t, best].sum()) if renormalize else 1.0
        assert ids[t].tolist() == best
        torch.testing.assert_close(weights[t], probabilities[t, best] / total)


def test_weights_are_float32_whatever_the_logits_are(device: torch.device, rng: torch.Generator) -> None:
    weights, _ = route(torch.randn(4, 8, generator=rng, device=device).bfloat16(), 2, True)
    assert weights.dtype is torch.float32


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 100])
@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_experts(num_tokens: int, top_k: int, device: torch.device, rng: torch.Generator) -> None:
    x = torch.randn(num_tokens, 16, generator=rng, device=device)
    gate_up = torch.randn(5, 24, 16, generator=rng, device=device) / 4
    down = torch.randn(5, 16, 12, generator=rng, device=device) / 4
    weights, ids = route(torch.randn(num_tokens, 5, generator=rng, device=device), top_k, False)
    expected = by_definition(x, gate_up, down, weights, ids)
    torch.testing.assert_close(moe_experts(x, gate_up, down, weights, ids), expected, rtol=1e-5, atol=1e-5)


def test_all_tokens_may_choose_the_same_experts(device: torch.device, rng: torch.Generator) -> None:
    x = torch.randn(9, 16, generator=rng, device=device)
    gate_up = torch.randn(5, 24, 16, generator=rng, device=device) / 4
    down = torch.randn(5, 16, 12, generator=rng, device=device) / 4
    ids = torch.tensor([[4, 1]], device=device).expand(9, 2)
    weights = torch.tensor([[0.75, 0.25]], device=device).expand(9, 2)
    expected = by_definition(x, gate_up, down, weights, ids)
    torch.testing.assert_close(moe_experts(x, gate_up, down, weights, ids), expected, rtol=1e-5, atol=1e-5)
