"""Rotary frequencies, as a checkpoint's configuration stretches them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from engine.rope_config import RopeConfig


def inverse_frequencies(rope: RopeConfig, max_model_len: int) -> Tensor:
    """[size / 2] float32, radians per position.

    "linear" slows all of them down by `factor` (Chen et al., 2023). "llama3" does so where a wavelength is beyond the
    original context, leaves fast ones as they are, and interpolates between (Llama 3.1's model code). "yarn" does the
    same between two numbers of turns, linear in the index (Peng et al., 2023). "longrope" has a factor for each (Ding
    et al., 2024).
    """
    exponents = torch.arange(0, rope.size, 2, dtype=torch.float32) / rope.size
    frequencies = 1.0 / rope.theta**exponents
    match rope.kind:
        case "default":
            return frequencies
        case "linear":
            return frequencies / rope.factor
        case "llama3":
            turns = rope.original_max_position * frequencies / (2 * math.pi)  # within the original context
            low, high = rope.low_freq_factor, rope.high_freq_factor
            kept = ((turns - low) / (high - low)).clamp(0, 1)
        case "yarn":
            kept = 1 - _yarn_ramp(rope)
        case "longrope":
            is_long = max_model_len > rope.original_max_position
            return frequencies / torch.tensor(rope.long_factors if is_long else rope.short_factors)
    return frequencies * (kept + (1 - kept) / rope.factor)


def _yarn_ramp(rope: RopeConfig) -> Tensor:
    """[size / 2]: 0 where a frequency stays, 1 where it is slowed down by the whole factor."""
    low, high = (
        rope.size * math.log(rope.original_max_position / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
        for turns in (rope.beta_fast, rope.beta_slow)
    )
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.size - 1)
    return ((torch.arange(rope.size // 2, dtype=torch.float32) - low) / max(high - low, 1e-3)).clamp(0, 1)
