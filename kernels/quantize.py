"""Weights and activations as small integers: how they are rounded, and what the integers stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Precision = Literal["float32", "bfloat16", "float16", "int8", "int4"]
"""How a weight is stored. int8 is W8A8: activations are rounded too, row by row. int4 is weight-only, in groups."""

_INT8_MAX = 127
_INT4_RANGE = (-8, 7)


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """`w = (codes - zeros) * scales`, one scale (and zero) for each `group_size` columns of a row."""

    codes: Tensor
    """[N, K] int8: all of the type's range of 8 bits; of 4 bits -8 to 7, or 0 to 15 where there are zeros."""
    scales: Tensor
    """[N, K / group_size] float32"""
    zeros: Tensor | None
    """[N, K / group_size] int8. Of 8 bits, a weight that has them is weight-only: activations are not rounded."""
    group_size: int
    num_bits: int

    def dequantize(self) -> Tensor:
        """[N, K] float32"""
        num_rows, num_columns = self.codes.shape
        grouped = self.codes.view(num_rows, num_columns // self.group_size, self.group_size).to(torch.float32)
        if self.zeros is not None:
            grouped = grouped - self.zeros.to(torch.float32).unsqueeze(2)
        return (grouped * self.scales.unsqueeze(2)).view(num_rows, num_columns)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric, one scale a row: codes int8 [..., K] in [-127, 127], scales float32 [...].

    x: [..., K]. A row depends on no other. A row of zeros has scale 0. Ties round to the even code.
    """
    wide = x.to(torch.float32)
    largest = wide.abs().amax(dim=-1)
    most = torch.full_like(largest, _INT8_MAX)  # torch would round a number over a tensor twice
    factors = torch.where(largest > 0, most / largest, 0.0)
    return (wide * factors.unsqueeze(-1)).round().to(torch.int8), largest / _INT8_MAX


def quantize_weight(weight: Tensor, num_bits: int, group_size: int) -> QuantizedWeight:
    """Round a weight [N, K] to the nearest codes: 8 bits one scale a row, 4 bits one scale for `group_size` columns.

    Where `group_size` does not divide K, a group is the largest divisor of K below it.
    """
    num_rows, num_columns = weight.shape
    if num_bits == 8:
        codes, scales = quantize_rows(weight)
        return QuantizedWeight(codes, scales.unsqueeze(1), None, num_columns, 8)
    size = next(g for g in range(min(group_size, num_columns), 0, -1) if num_columns % g == 0)
    low, high = _INT4_RANGE
    grouped = weight.to(torch.float32).view(num_rows, num_columns // size, size)
    most, least = grouped.amax(dim=2), grouped.amin(dim=2)
    scales = torch.maximum(most / high, least / low)
    factors = torch.where(scales > 0, 1 / scales, 0.0)
    codes = (grouped * factors.unsqueeze(2)).round().clamp(low, high).to(torch.int8).view(num_rows, num_columns)
    return QuantizedWeight(codes, scales, None, size, 4)
