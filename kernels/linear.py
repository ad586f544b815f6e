"""Linear layers over packed weights: the torch reference, and the choice of what runs.

T rows, K input features, N output features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from kernels.activation import Activation, gated_activation
from kernels.memory import Allocate, zeros
from kernels.native import library
from kernels.native_linear import WeightPart, pack_gated_linear, pack_linear
from kernels.quantize import Precision, QuantizedWeight, quantize_rows, quantize_weight

_FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Linear(Protocol):
    """`y = x W^T + bias + residual`, the last two where there are any. Owns its weight, in whatever form runs best."""

    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: [T, K]; residual: [T, N]; returns [T, N] in x's dtype."""


class GatedLinear(Protocol):
    """`activation(x Wg^T + bg) * (x Wu^T + bu)`"""

    @property
    def in_features(self) -> int: ...

    @property
    def out_features(self) -> int: ...

    def __call__(self, x: Tensor) -> Tensor:
        """x: [T, K]; returns [T, N] in x's dtype."""


def make_linear(
    parts: Sequence[WeightPart],
    bias: Tensor | None,
    precision: Precision,
    *,
    group_size: int = 128,
    allocate: Allocate = zeros,
) -> Linear:
    """A layer whose rows are those of `parts`, one after the other. Floats are rounded to `precision` here;
    packed weights lie where `allocate` says.

    Parts that are codes already stay as they are, whatever `precision` says: all of a layer's or none.
    """
    if library() is not None and _is_on_cpu(parts[0]):
        return pack_linear(parts, bias, precision, group_size, allocate)
    return TorchLinear(make_weight(parts, precision, group_size), bias)


def make_gated_linear(
    gate: WeightPart,
    up: WeightPart,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    precision: Precision,
    activation: Activation,
    *,
    group_size: int = 128,
    allocate: Allocate = zeros,
) -> GatedLinear:
    if library() is not None and _is_on_cpu(gate):
        return pack_gated_linear(gate, up, gate_bias, up_bias, precision, activation, group_size, allocate)
    bias = None if gate_bias is None or up_bias is None else torch.cat((gate_bias, up_bias))
    return TorchGatedLinear(TorchLinear(make_weight([gate, up], precision, group_size), bias), activation)


def make_weight(parts: Sequence[WeightPart], precision: Precision, group_size: int) -> Tensor | QuantizedWeight:
    """The parts as one weight [N, K], stored as `precision` says."""
    if precision in _FLOATS and all(isinstance(part, Tensor) for part in parts):
        return torch.cat([part.to(_FLOATS[precision]) for part in parts if isinstance(part, Tensor)])
    num_bits = 8 if precision == "int8" else 4
    codes = [p if isinstance(p, QuantizedWeight) else quantize_weight(p, num_bits, group_size) for p in parts]
    zeros = [p.zeros for p in codes if p.zeros is not None]
    first = codes[0]
    return QuantizedWeight(
        torch.cat([p.codes for p in codes]),
        torch.cat([p.scales for p in codes]),
        torch.cat(zeros) if zeros else None,
        first.group_size,
        first.num_bits,
    )


def _is_on_cpu(part: WeightPart) -> bool:
    return (part.codes if isinstance(part, QuantizedWeight) else part).device.type == "cpu"


@dataclass(frozen=True, slots=True)
class TorchLinear:
    weight: Tensor | QuantizedWeight
    bias: Tensor | None

    @property
    def in_features(self) -> int:
        return int(self._matrix.shape[1])

    @property
    def out_features(self) -> int:
        return int(self._matrix.shape[0])

    @property
    def _matrix(self) -> Tensor:
        return self.weight.codes if isinstance(self.weight, QuantizedWeight) else self.weight

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        product = self._product(x)
        if self.bias is not None:
            product = product + self.bias
        return (product if residual is None else product + residual).to(x.dtype)

    def _product(self, x: Tensor) -> Tensor:
        weight = self.weight
        if isinstance(weight, Tensor):
            return F.linear(x, weight.to(x.dtype))
        if weight.num_bits == 4 or weight.zeros is not None or weight.group_size != weight.codes.shape[1]:
            return F.linear(x, weight.dequantize().to(x.dtype))
        codes, scales = quantize_rows(x)
        return int_matmul(codes, weight.codes).to(torch.float32) * (scales.unsqueeze(1) * weight.scales.view(1, -1))


@dataclass(frozen=True, slots=True)
class TorchGatedLinear:
    gate_up: TorchLinear
    activation: Activation

    @property
    def in_features(self) -> int:
        return self.gate_up.in_features

    @property
    def out_features(self) -> int:
        return self.gate_up.out_features // 2

    def __call__(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return gated_activation(gate, up, self.activation)


def int_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a: [T, K] int8; b: [N, K] int8; returns `a b^T` [T, N] int32, exact."""
    if a.device.type == "cpu":
        return torch._int_mm(a, b.t())
    return (a.to(torch.float64) @ b.to(torch.float64).t()).to(torch.int32)
