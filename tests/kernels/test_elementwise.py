"""Norm, rotation and activation against their formulas."""

import math

import pytest
import torch

from kernels.rms_norm import rms_norm
from kernels.rope import apply_rope, rope_angles


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm(dtype: torch.dtype, device: torch.device, rng: torch.Generator) -> None:
    x, weight = (torch.randn(*shape, generator=rng, device=device).to(dtype) for shape in ((5, 32), (32,)))
    wide = x.double()
    expected = wide / (wide.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), expected.to(dtype))


def test_rms_norm_with_a_weight_for_each_head(device: torch.device, rng: torch.Generator) -> None:
    x, weight = torch.randn(5, 3, 16, generator=rng, device=device), torch.randn(3, 16, generator=rng, device=device)
    expected = torch.stack([rms_norm(x[:, head], weight[head], 1e-6) for head in range(3)], dim=1)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), expected)


def test_rope_turns_pairs_by_their_angle(device: torch.device, rng: torch.Generator) -> None:
    x = torch.randn(4, 2, 6, generator=rng, device=device)
    positions, frequencies = [0, 1, 7, 1000], [1.0, 0.1, 0.001]
    cos, sin = rope_angles(torch.tensor(positions, device=device), torch.tensor(frequencies, device=device))
    turned = apply_rope(x, cos, sin)
    for t, position in enumerate(positions):
        for i, frequency in enumerate(frequencies):
            c, s = math.cos(position * frequency), math.sin(position * frequency)
            a, b = x[t, :, i], x[t, :, i + 3]
            torch.testing.assert_close(turned[t, :, i], a * c - b * s, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(turned[t, :, i + 3], b * c + a * s, rtol=1e-4, atol=1e-4)


def test_rope_keeps_the_type(device: torch.device) -> None:
    cos, sin = rope_angles(torch.tensor([3], device=device), torch.ones(2, device=device))
    assert apply_rope(torch.ones(1, 1, 4, dtype=torch.bfloat16, device=device), cos, sin).dtype is torch.bfloat16
