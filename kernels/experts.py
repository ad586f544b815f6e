"""The experts of a mixture (Shazeer et al., 2017): each token goes through those that `kernels/moe.py` chose for it.

T tokens, C hidden size, I size of an expert, E experts, k chosen ones a token.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from kernels.activation import Activation
from kernels.linear import GatedLinear, Linear, make_gated_linear, make_linear
from kernels.memory import Arena
from kernels.native import native_function
from kernels.native_linear import NativeLinear, WeightPart
from kernels.quantize import Precision


class Experts(Protocol):
    """Weighted sum of gated MLPs. Owns their weights."""

    @property
    def num_experts(self) -> int: ...

    def __call__(self, x: Tensor, weights: Tensor, expert_ids: Tensor, residual: Tensor | None = None) -> Tensor:
        """x, residual: [T, C]; weights: [T, k] float32; expert_ids: [T, k] int64, no two alike in a row; returns
        [T, C] in x's dtype."""


def make_experts(
    gate: Sequence[WeightPart],
    up: Sequence[WeightPart],
    down: Sequence[WeightPart],
    precision: Precision,
    activation: Activation,
    *,
    gate_bias: Sequence[Tensor] | None = None,
    up_bias: Sequence[Tensor] | None = None,
    down_bias: Sequence[Tensor] | None = None,
    group_size: int = 128,
) -> Experts:
    """One element of each sequence an expert: gate and up [I, C] with biases [I], down [C, I] with bias [C]."""
    none: Sequence[None] = [None] * len(gate)
    allocate = Arena()
    gate_ups = [
        make_gated_linear(g, u, gb, ub, precision, activation, group_size=group_size, allocate=allocate)
        for g, u, gb, ub in zip(gate, up, gate_bias or none, up_bias or none, strict=True)
    ]
    downs = [
        make_linear([d], b, precision, group_size=group_size, allocate=allocate)
        for d, b in zip(down, down_bias or none, strict=True)
    ]
    if all(isinstance(layer, NativeLinear) for layer in (*gate_ups, *downs)):
        return NativeExperts(cast("list[NativeLinear]", gate_ups), cast("list[NativeLinear]", downs))
    return TorchExperts(tuple(gate_ups), tuple(downs))


class NativeExperts:
    """The same in C++: see `csrc/experts.cpp`."""

    def __init__(self, gate_up: Sequence[NativeLinear], down: Sequence[NativeLinear]) -> None:
        self.num_experts = len(down)
        self._layers = (tuple(gate_up), tuple(down))  # keeps what the pointers point to
        self._gate_up, self._down = (self._pointers(layers) for layers in self._layers)
        self.addresses = ctypes.addressof(self._gate_up), ctypes.addressof(self._down)
        self._run = native_function("penstock_experts", "ppqpppqqpp")

    def _pointers(self, layers: Sequence[NativeLinear]) -> ctypes.Array[ctypes.c_void_p]:
        return (ctypes.c_void_p * self.num_experts)(*(ctypes.addressof(layer.weight.struct) for layer in layers))

    def __call__(self, x: Tensor, weights: Tensor, expert_ids: Tensor, residual: Tensor | None = None) -> Tensor:
        x, weights, expert_ids = x.contiguous(), weights.contiguous(), expert_ids.contiguous()
        out = torch.empty_like(x)
        if residual is not None:
            residual = residual.contiguous()
        self._run(
            *(*self.addresses, self.num_experts),
            *(x.data_ptr(), weights.data_ptr(), expert_ids.data_ptr(), *expert_ids.shape),
            *(None if residual is None else residual.data_ptr(), out.data_ptr()),
        )
        return out


@dataclass(frozen=True, slots=True)
class TorchExperts:
    """Tokens are sorted by expert, so that each expert runs once, over the rows that are its own, without padding."""

    gate_up: tuple[GatedLinear, ...]
    down: tuple[Linear, ...]

    @property
    def num_experts(self) -> int:
        return len(self.down)

    def __call__(self, x: Tensor, weights: Tensor, expert_ids: Tensor, residual: Tensor | None = None) -> Tensor:
        num_tokens, top_k = expert_ids.shape
        flat_ids = expert_ids.flatten()
        order = flat_ids.argsort(stable=True)
        rows = x.index_select(0, order.div(top_k, rounding_mode="floor"))
        counts = flat_ids.bincount(minlength=self.num_experts).tolist()
        outputs = [self.down[e](self.gate_up[e](part)) for e, part in enumerate(torch.split(rows, counts)) if counts[e]]
        by_token = torch.cat(outputs).index_select(0, order.argsort()).view(num_tokens, top_k, -1)
        total = (by_token * weights.unsqueeze(-1)).sum(dim=1).to(x.dtype)
        return total if residual is None else total + residual
