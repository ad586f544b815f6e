"""Gated activations of MLPs (Shazeer, 2020)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor
from torch.nn import functional as F

Activation = Literal["silu", "gelu_tanh", "swigluoai"]

_OAI_LIMIT = 7.0
_OAI_ALPHA = 1.702


def gated_activation(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """`activation(gate) * up`. gate, up: [T, I]; returns [T, I].

    "swigluoai" is gpt-oss's: both sides are clamped, gelu's sigmoid form gates, and up is moved by one (OpenAI, 2025).
    """
    match activation:
        case "silu":
            return F.silu(gate) * up
        case "gelu_tanh":
            return F.gelu(gate, approximate="tanh") * up
        case "swigluoai":
            gate, up = gate.clamp(max=_OAI_LIMIT), up.clamp(-_OAI_LIMIT, _OAI_LIMIT)
            return gate * (_OAI_ALPHA * gate).sigmoid() * (up + 1)
