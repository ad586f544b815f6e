"""Rotary position embedding (Su et al., 2021), in the half-split form: element i turns with element i + D/2."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_angles(positions: Tensor, inverse_frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of the positions, once for all layers of a step.

    positions: [T] integers; inverse_frequencies: [D/2] float32; returns two float32 [T, 1, D]. The first half of the
    sines is negated, which turns the rotation into `x * cos + swap_halves(x) * sin`.
    """
    angles = positions.to(torch.float32).unsqueeze(1) * inverse_frequencies
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((cos, cos), dim=1).unsqueeze(1), torch.cat((-sin, sin), dim=1).unsqueeze(1)


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the heads of x by the angles of their positions, in float32.

    x: [T, H, D]; cos, sin: [T, 1, D] from `rope_angles`; returns x's shape and dtype, contiguous.
    """
    wide = x.to(torch.float32)
    return torch.addcmul(wide * cos, wide.roll(x.shape[-1] // 2, dims=-1), sin).to(x.dtype)
