"""Rotary position embedding (Su et al., 2021), in the half-split form: element i turns with element i + P/2.

P of the D elements of a head turn, the first ones; the rest stays as it is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.native import function


def rope_angles(positions: Tensor, inverse_frequencies: Tensor, factor: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the positions times `factor`, once for all layers of a step.

    positions: [T] int64; inverse_frequencies: [P/2] float32; returns two float32 [T, P/2].
    """
    run = function("penstock_rope_angles", "pqpqfpp")
    if run is not None and positions.device.type == "cpu":
        positions, frequencies = positions.contiguous(), inverse_frequencies.contiguous()
        cos, sin = torch.empty(2, len(positions), len(frequencies))
        run(
            *(positions.data_ptr(), len(positions), frequencies.data_ptr(), len(frequencies)),
            *(factor, cos.data_ptr(), sin.data_ptr()),
        )
        return cos, sin
    angles = positions.to(torch.float32).unsqueeze(1) * inverse_frequencies
    return angles.cos() * factor, angles.sin() * factor


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the heads of x by the angles of their positions, in float32.

    x: [T, H, D]; cos, sin: [T, P/2] from `rope_angles`; returns x's shape and dtype, contiguous.
    """
    half = cos.shape[1]
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    first, second, rest = torch.split(x.to(torch.float32), [half, half, x.shape[-1] - 2 * half], dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)
    return turned.to(x.dtype)
