"""Experts against a loop over tokens."""

import pytest
import torch
from torch.nn import functional as F

from kernels.experts import make_experts
from kernels.linear import make_gated_linear, make_linear
from kernels.native import library
from kernels.quantize import Precision

C, SIZE, NUM_EXPERTS = 48, 40, 5


class Weights:
    def __init__(self, rng: torch.Generator) -> None:
        device = rng.device
        self.gate, self.up = (torch.randn(NUM_EXPERTS, SIZE, C, generator=rng, device=device) / 6 for _ in range(2))
        self.down = torch.randn(NUM_EXPERTS, C, SIZE, generator=rng, device=device) / 6
        self.gate_bias, self.up_bias = (torch.randn(NUM_EXPERTS, SIZE, generator=rng, device=device) for _ in "gu")
        self.down_bias = torch.randn(NUM_EXPERTS, C, generator=rng, device=device)

    def __call__(self, x: torch.Tensor, gates: torch.Tensor, ids: torch.Tensor, biased: bool) -> torch.Tensor:
        out = torch.zeros_like(x, dtype=torch.float64)
        zero = torch.zeros(1, device=x.device)
        for t in range(x.shape[0]):
            for gate, e in zip(gates[t].tolist(), ids[t].tolist(), strict=True):
                biases = (self.gate_bias[e], self.up_bias[e], self.down_bias[e]) if biased else (zero, zero, zero)
                inner = F.silu(self.gate[e] @ x[t] + biases[0]) * (self.up[e] @ x[t] + biases[1])
                out[t] += gate * (self.down[e] @ inner + biases[2]).double()
        return out.to(x.dtype)


def choose(num_tokens: int, top_k: int, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.rand(num_tokens, NUM_EXPERTS, generator=rng, device=rng.device)
    weights, ids = scores.topk(top_k, dim=-1)
    return weights, ids


@pytest.mark.parametrize("num_tokens", [1, 2, 7, 100])
@pytest.mark.parametrize("top_k", [1, 2, 5])
@pytest.mark.parametrize("biased", [False, True])
def test_experts(num_tokens: int, top_k: int, biased: bool, rng: torch.Generator) -> None:
    weights = Weights(rng)
    x = torch.randn(num_tokens, C, generator=rng, device=rng.device)
    gates, ids = choose(num_tokens, top_k, rng)
    gate, up, down = list(weights.gate), list(weights.up), list(weights.down)
    if biased:
        experts = make_experts(
            *(gate, up, down, "float32", "silu"),
            gate_bias=list(weights.gate_bias),
            up_bias=list(weights.up_bias),
            down_bias=list(weights.down_bias),
        )
    else:
        experts = make_experts(gate, up, down, "float32", "silu")
    assert experts.num_experts == NUM_EXPERTS
    expected = weights(x, gates, ids, biased)
    torch.testing.assert_close(experts(x, gates, ids), expected, rtol=1e-5, atol=1e-5)
    residual = torch.randn(num_tokens, C, generator=rng, device=rng.device)
    torch.testing.assert_close(experts(x, gates, ids, residual), expected + residual, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["bfloat16", "float16", "int8", "int4"])
def test_stored_experts_are_linear_layers_of_the_same_precision(precision: Precision, rng: torch.Generator) -> None:
    weights = Weights(rng)
    x = torch.randn(11, C, generator=rng, device=rng.device)
    gates, ids = choose(11, 2, rng)
    experts = make_experts(list(weights.gate), list(weights.up), list(weights.down), precision, "silu")
    layers = [
        (make_gated_linear(g, u, None, None, precision, "silu"), make_linear([d], None, precision))
        for g, u, d in zip(weights.gate, weights.up, weights.down, strict=True)
    ]
    expected = torch.zeros_like(x)
    for t in range(11):
        for gate, e in zip(gates[t], ids[t].tolist(), strict=True):
            gate_up, down = layers[e]
            expected[t] += gate * down(gate_up(x[t : t + 1]))[0]
    torch.testing.assert_close(experts(x, gates, ids), expected, rtol=1e-4, atol=1e-4)


def test_all_tokens_may_choose_the_same_experts(rng: torch.Generator) -> None:
    weights = Weights(rng)
    x = torch.randn(9, C, generator=rng, device=rng.device)
    ids = torch.tensor([[4, 1]], device=rng.device).expand(9, 2).contiguous()
    gates = torch.tensor([[0.75, 0.25]], device=rng.device).expand(9, 2).contiguous()
    experts = make_experts(list(weights.gate), list(weights.up), list(weights.down), "float32", "silu")
    torch.testing.assert_close(experts(x, gates, ids), weights(x, gates, ids, False), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8", "int4"])
def test_a_token_is_the_same_alone_and_among_others(precision: Precision, rng: torch.Generator) -> None:
    """Bit for bit, whoever else chose the same experts."""
    if library() is None:
        pytest.skip("the torch reference makes no such promise")
    weights = Weights(rng)
    experts = make_experts(list(weights.gate), list(weights.up), list(weights.down), precision, "silu")
    x = torch.randn(60, C, generator=rng)
    gates, ids = choose(60, 2, rng)
    together = experts(x, gates, ids)
    for size in (1, 3, 13, 31):
        parts = zip(torch.split(x, size), torch.split(gates, size), torch.split(ids, size), strict=True)
        assert torch.equal(torch.cat([experts(*part) for part in parts]), together), size
