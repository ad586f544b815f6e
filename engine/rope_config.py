"""How positions turn queries and keys, read from config.json. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from engine.json_fields import Fields

Kind = Literal["default", "linear", "llama3", "yarn", "longrope"]


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Base of the rotary frequencies and how they are stretched; `kind` says which of the other fields count."""

    theta: float
    size: int
    """Elements of a head that turn, from its first on."""
    kind: Kind = "default"
    factor: float = 1.0
    original_max_position: int = 8192
    attention_factor: float = 1.0
    """What cosines and sines are multiplied by (yarn, longrope)."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()
    """Each [size / 2]. Long where the engine serves more than `original_max_position` tokens, whatever a request takes:
    K that is cached must not depend on what comes after it."""


def read_rope(fields: Fields, layer_type: str, head_size: int, max_position: int) -> RopeConfig:
    """From `rope_parameters` (transformers 5; may differ by type of layer), or `rope_theta` and `rope_scaling`."""
    scaling = fields.group("rope_parameters") or fields.group("rope_scaling")
    if scaling is not None and scaling.get(layer_type) is not None:
        scaling = scaling.group(layer_type)
    elif layer_type == "sliding_attention" and fields.get("rope_local_base_freq") is not None:
        return RopeConfig(fields.number("rope_local_base_freq"), head_size)
    theta_fields = scaling if scaling is not None and scaling.get("rope_theta") is not None else fields
    theta = theta_fields.number("rope_theta", default=1e4)
    size = _size(fields if scaling is None or scaling.get("partial_rotary_factor") is None else scaling, head_size)
    if scaling is None:
        return RopeConfig(theta, size)
    key = "rope_type" if scaling.get("rope_type") is not None else "type"
    match scaling.get(key):
        case "default" | "dynamic":  # dynamic changes positions beyond the model's own limit only, which we don't serve
            return RopeConfig(theta, size)
        case "linear":
            return RopeConfig(theta, size, "linear", factor=scaling.number("factor"))
        case "llama3":
            return RopeConfig(
                theta,
                size,
                "llama3",
                factor=scaling.number("factor"),
                low_freq_factor=scaling.number("low_freq_factor"),
                high_freq_factor=scaling.number("high_freq_factor"),
                original_max_position=scaling.integer("original_max_position_embeddings"),
            )
        case "yarn" if scaling.get("long_factor") is None:
            return _yarn(scaling, theta, size, max_position)
        case "longrope" | "su" | "yarn":
            return _longrope(fields, scaling, theta, size, max_position)
    raise scaling.error(key, "must be default, linear, dynamic, llama3, yarn or longrope; others are not supported")


def yarn_scale(factor: float, weight: float) -> float:
    """What attention is sharpened by where the context is `factor` times the original (Peng et al., 2023)."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _size(fields: Fields, head_size: int) -> int:
    size = int(head_size * fields.number("partial_rotary_factor", default=1.0))
    if size % 2 or not 0 < size <= head_size:
        raise fields.error("partial_rotary_factor", f"must leave an even part of a head of {head_size} elements")
    return size


def _yarn(scaling: Fields, theta: float, size: int, max_position: int) -> RopeConfig:
    original = scaling.integer("original_max_position_embeddings", default=max_position)
    factor = scaling.number("factor", default=max_position / original)
    attention_factor = yarn_scale(factor, 1.0)
    if scaling.get("attention_factor") is not None:
        attention_factor = scaling.number("attention_factor")
    elif scaling.get("mscale") and scaling.get("mscale_all_dim"):
        weights = scaling.number("mscale"), scaling.number("mscale_all_dim")
        attention_factor = yarn_scale(factor, weights[0]) / yarn_scale(factor, weights[1])
    return RopeConfig(
        theta,
        size,
        "yarn",
        factor=factor,
        original_max_position=original,
        attention_factor=attention_factor,
        beta_fast=scaling.number("beta_fast", default=32.0),
        beta_slow=scaling.number("beta_slow", default=1.0),
        truncate=scaling.boolean("truncate", default=True),
    )


def _longrope(fields: Fields, scaling: Fields, theta: float, size: int, max_position: int) -> RopeConfig:
    outside = fields.get("original_max_position_embeddings") is not None
    original = (fields if outside else scaling).integer("original_max_position_embeddings")
    factor = scaling.number("factor", default=max_position / original)
    inferred = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return RopeConfig(
        theta,
        size,
        "longrope",
        factor=factor,
        original_max_position=original,
        attention_factor=scaling.number("attention_factor", default=inferred),
        short_factors=_factors(scaling, "short_factor", size // 2),
        long_factors=_factors(scaling, "long_factor", size // 2),
    )


def _factors(scaling: Fields, name: str, count: int) -> tuple[float, ...]:
    values = scaling.get(name)
    numbers = isinstance(values, list) and all(isinstance(v, int | float) and v > 0 for v in values)
    if not numbers or len(values) != count:
        raise scaling.error(name, f"must be a list of {count} numbers > 0")
    return tuple(float(value) for value in values)
