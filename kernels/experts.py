"""The experts of a mixture (Shazeer et al., 2017): each token goes through those that `kernels/moe.py` chose for it.

T tokens, C hidden size, I size of an expert, E experts, k chosen ones a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kernels.activation import Activation
from kernels.linear import GatedLinear, Linear, WeightPart, make_gated_linear, make_linear
from kernels.quantize import Precision


class Experts(Protocol):
    """Weighted sum of gated MLPs. Owns their weights."""

    num_experts: int

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
    gate_ups = [
        make_gated_linear(g, u, gb, ub, precision, activation, group_size=group_size)
        for g, u, gb, ub in zip(gate, up, gate_bias or none, up_bias or none, strict=True)
    ]
    downs = [
        make_linear([d], b, precision, group_size=group_size) for d, b in zip(down, down_bias or none, strict=True)
    ]
    return TorchExperts(tuple(gate_ups), tuple(downs))


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
