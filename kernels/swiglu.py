"""The gated activation of the MLPs (Shazeer, 2020)."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def swiglu(gate_up: Tensor) -> Tensor:
    """`silu(gate) * up`, where gate_up [..., 2I] holds the gates in its first half; returns [..., I]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
