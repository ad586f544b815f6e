"""A model's gate, as the kernels want to know it."""

from __future__ import annotations

from engine.model_config import ModelConfig
from kernels.moe import Gating


def gating(config: ModelConfig) -> Gating | None:
    """None where the model has no experts."""
    moe, names = config.moe, config.family.experts
    if moe is None or names is None:
        return None
    return Gating(
        top_k=moe.top_k,
        renormalize=moe.renormalize,
        scores=names.routing.scores,
        num_groups=moe.num_groups,
        top_groups=moe.top_groups,
        group_best=2 if names.routing.group_score == "sum of best two" else 1,
        scale=moe.scale,
    )
