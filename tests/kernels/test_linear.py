"""Linear layers of every precision against the products of the weights that they stand for."""

from typing import Any

import pytest
import torch
from torch.nn import functional as F

from kernels import threads
from kernels.activation import Activation, gated_activation
from kernels.linear import TorchLinear, make_gated_linear, make_linear, make_weight
from kernels.native import library
from kernels.quantize import Precision, QuantizedWeight, quantize_rows, quantize_weight

PRECISIONS: list[Precision] = ["float32", "bfloat16", "float16", "int8", "int4"]
SHAPES = [(1, 1, 1), (1, 64, 96), (3, 7, 33), (5, 130, 31), (8, 256, 64), (33, 96, 200), (70, 512, 48)]
"""Rows, input features, output features."""


def by_definition(x: torch.Tensor, weight: torch.Tensor, precision: Precision) -> torch.Tensor:
    """In float64, of a weight and activations rounded as `precision` says."""
    match precision:
        case "int8":
            codes, scales = quantize_rows(x)
            x = codes.double() * scales.double().unsqueeze(1)
            weight = quantize_weight(weight, 8, 0).dequantize()
        case "int4":
            weight = quantize_weight(weight, 4, 32).dequantize()
        case _:
            weight = weight.to(getattr(torch, precision))
    return x.double() @ weight.double().t()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_product_is_that_of_the_stored_weight(
    precision: Precision, shape: tuple[int, int, int], device: torch.device, rng: torch.Generator
) -> None:
    num_rows, k, n = shape
    x = torch.randn(num_rows, k, generator=rng, device=device)
    weight = torch.randn(n, k, generator=rng, device=device)
    layer = make_linear([weight], None, precision, group_size=32)
    assert (layer.in_features, layer.out_features) == (k, n)
    torch.testing.assert_close(layer(x).double(), by_definition(x, weight, precision), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bias_and_residual_are_added(precision: Precision, device: torch.device, rng: torch.Generator) -> None:
    x, residual = (torch.randn(9, n, generator=rng, device=device) for n in (48, 70))
    weight, bias = torch.randn(70, 48, generator=rng, device=device), torch.randn(70, generator=rng, device=device)
    plain = make_linear([weight], None, precision)(x)
    layer = make_linear([weight], bias, precision)
    torch.testing.assert_close(layer(x), plain + bias, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(x, residual), plain + bias + residual, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_parts_are_stacked(precision: Precision, device: torch.device, rng: torch.Generator) -> None:
    x, weight = torch.randn(4, 64, generator=rng, device=device), torch.randn(90, 64, generator=rng, device=device)
    parts = [part.bfloat16() for part in torch.split(weight, [37, 1, 52])]
    together = make_linear([weight.bfloat16()], None, precision)(x)
    assert torch.equal(make_linear(parts, None, precision)(x), together)


@pytest.mark.parametrize("num_bits", [8, 4])
@pytest.mark.parametrize("has_zeros", [False, True])
def test_codes_of_a_checkpoint_are_used_as_they_are(
    num_bits: int, has_zeros: bool, device: torch.device, rng: torch.Generator
) -> None:
    group, (n, k) = 16, (40, 64)
    low, high = (-127, 127) if num_bits == 8 else (0, 15) if has_zeros else (-8, 7)
    integers: dict[str, Any] = {"generator": rng, "device": device}
    codes = torch.randint(low, high + 1, (n, k), **integers).to(torch.int8)
    zeros = torch.randint(low, high + 1, (n, k // group), **integers).to(torch.int8) if has_zeros else None
    scales = torch.rand(n, k // group, generator=rng, device=device) / 16
    weight = QuantizedWeight(codes, scales, zeros, group, num_bits)
    x = torch.randn(5, k, generator=rng, device=device)
    expected = x.double() @ weight.dequantize().double().t()
    torch.testing.assert_close(make_linear([weight], None, "float32")(x).double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh", "swigluoai"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_gated(precision: Precision, activation: Activation, device: torch.device, rng: torch.Generator) -> None:
    x = torch.randn(6, 40, generator=rng, device=device)
    gate, up = (torch.randn(50, 40, generator=rng, device=device) for _ in range(2))
    gate_bias, up_bias = (torch.randn(50, generator=rng, device=device) for _ in range(2))
    layer = make_gated_linear(gate, up, gate_bias, up_bias, precision, activation)
    expected = gated_activation(
        make_linear([gate], gate_bias, precision)(x), make_linear([up], up_bias, precision)(x), activation
    )
    assert (layer.in_features, layer.out_features) == (40, 50)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_silu_is_the_gate_of_swiglu() -> None:
    gate, up = torch.randn(3, 8), torch.randn(3, 8)
    torch.testing.assert_close(gated_activation(gate, up, "silu"), gate * torch.sigmoid(gate) * up)


def test_gelu_tanh_is_that_of_torch() -> None:
    gate, up = torch.randn(3, 8), torch.randn(3, 8)
    torch.testing.assert_close(gated_activation(gate, up, "gelu_tanh"), F.gelu(gate, approximate="tanh") * up)


def test_rounded_rows_are_within_half_a_step_and_alone(rng: torch.Generator) -> None:
    x = torch.randn(7, 33, generator=rng) * torch.logspace(-3, 3, 7).unsqueeze(1)
    codes, scales = quantize_rows(x)
    assert int(codes.abs().max()) == 127
    assert bool(((codes * scales.unsqueeze(1) - x).abs() <= 0.5001 * scales.unsqueeze(1)).all())
    alone = [quantize_rows(row.unsqueeze(0)) for row in x]
    assert torch.equal(codes, torch.cat([c for c, _ in alone]))
    assert torch.equal(scales, torch.cat([s for _, s in alone]))


def test_a_row_of_zeros_stays_zero() -> None:
    codes, scales = quantize_rows(torch.zeros(2, 8))
    assert not codes.any()
    assert not scales.any()


def test_groups_that_do_not_divide_become_smaller(rng: torch.Generator) -> None:
    assert quantize_weight(torch.randn(3, 96, generator=rng), 4, 128).group_size == 96
    assert quantize_weight(torch.randn(3, 200, generator=rng), 4, 128).group_size == 100


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_row_is_the_same_alone_and_among_others(precision: Precision, rng: torch.Generator) -> None:
    """Bit for bit, whatever the number of rows: prefix reuse, resume and phase splitting rely on it."""
    if library() is None:
        pytest.skip("the torch reference makes no such promise")
    x = torch.randn(100, 130, generator=rng)
    weight, bias = torch.randn(200, 130, generator=rng), torch.randn(200, generator=rng)
    layer = make_linear([weight], bias, precision, group_size=26)
    together = layer(x)
    for size in (1, 2, 5, 11, 12, 13, 24, 37):
        assert torch.equal(torch.cat([layer(part) for part in torch.split(x, size)]), together), size


@pytest.mark.parametrize("num_threads", [2, 3])
@pytest.mark.parametrize("num_rows", [1, 50])
def test_threads_change_nothing(num_threads: int, num_rows: int, rng: torch.Generator) -> None:
    x, weight = torch.randn(num_rows, 64, generator=rng), torch.randn(70, 64, generator=rng)
    layer, before = make_linear([weight], None, "float32"), threads.num_threads()
    expected = layer(x)
    threads.set_num_threads(num_threads)
    try:
        assert torch.equal(layer(x), expected)
    finally:
        threads.set_num_threads(before)


def test_int8_is_the_reference_bit_for_bit(rng: torch.Generator) -> None:
    x, weight = torch.randn(30, 100, generator=rng), torch.randn(50, 100, generator=rng)
    bias, residual = torch.randn(50, generator=rng), torch.randn(30, 50, generator=rng)
    reference = TorchLinear(make_weight([weight], "int8", 128), bias)
    assert torch.equal(make_linear([weight], bias, "int8")(x, residual), reference(x, residual))
