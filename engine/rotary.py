"""Rotary frequencies, as a checkpoint's configuration stretches them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.model_config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_size: int) -> Tensor:
    """[D/2] float32, radians per position.

    "linear" slows all of them down by `factor` (Chen et al., 2023). "llama3" does so where a wavelength is beyond the
    original context, leaves fast ones as they are, and interpolates between (Llama 3.1's model code).
    """
    exponents = torch.arange(0, head_size, 2, dtype=torch.float32) / head_size
    frequencies = 1.0 / rope.theta**exponents
    if rope.kind == "linear":
        return frequencies / rope.factor
    if rope.kind == "llama3":
        turns = rope.original_max_position * frequencies / (2 * math.pi)  # within the original context
        low, high = rope.low_freq_factor, rope.high_freq_factor
        kept = ((turns - low) / (high - low)).clamp(0, 1)
        return frequencies * (kept + (1 - kept) / rope.factor)
    return frequencies
