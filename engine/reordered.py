"""Layers whose weight takes the columns of its input in another order: codes that were quantised in act-order.

There the columns that share a scale do not lie side by side. Sorted by group they do, and the input is sorted alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.linear import GatedLinear, Linear
from kernels.quantize import QuantizedWeight


@dataclass(frozen=True, slots=True)
class ReorderedWeight:
    """Column i of `weight` is column `order[i]` of the layer's."""

    weight: QuantizedWeight
    order: Tensor
    """[K] int64"""

    def dequantize(self) -> Tensor:
        """[N, K] float32, in the layer's own order."""
        sorted_columns = self.weight.dequantize()
        return torch.empty_like(sorted_columns).index_copy_(1, self.order, sorted_columns)


class ReorderedLinear:
    def __init__(self, linear: Linear, order: Tensor) -> None:
        self._linear, self._order = linear, order
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        return self._linear(x.index_select(1, self._order), residual)


class ReorderedGatedLinear:
    def __init__(self, linear: GatedLinear, order: Tensor) -> None:
        self._linear, self._order = linear, order
        self.in_features, self.out_features = linear.in_features, linear.out_features

    def __call__(self, x: Tensor) -> Tensor:
        return self._linear(x.index_select(1, self._order))
