"""How the supported architectures differ: one description for all of them.

All are pre-norm decoders with grouped-query attention, rotary positions, gated MLPs (dense, or a mixture of experts in
some layers), and root mean square norms.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType


class WindowRule(Enum):
    """When a `sliding_window` in config.json limits attention."""

    NEVER = "never"
    WHEN_SET = "when set"
    WHEN_SWITCHED_ON = "when use_sliding_window is true"
    UPPER_LAYERS = "when use_sliding_window is true, from layer max_window_layers on"


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """Names in the checkpoint. `expert` has a place for the number of the expert."""

    router: str
    expert: str
    gate: str
    up: str
    down: str
    intermediate_size_key: str
    norm_topk_prob: bool | None
    """None: config.json says."""


@dataclass(frozen=True, slots=True)
class Family:
    attention_bias: bool | None
    """None: config.json says, and then for the output projection too. True: for Q, K and V only."""
    qk_norm: bool
    window: WindowRule
    rope_theta: float
    """Where config.json has none."""
    experts: ExpertNames | None = None


_MIXTRAL_EXPERTS = ExpertNames(
    router="block_sparse_moe.gate",
    expert="block_sparse_moe.experts.{}",
    gate="w1",
    up="w3",
    down="w2",
    intermediate_size_key="intermediate_size",
    norm_topk_prob=True,
)
_QWEN3_EXPERTS = ExpertNames(
    router="mlp.gate",
    expert="mlp.experts.{}",
    gate="gate_proj",
    up="up_proj",
    down="down_proj",
    intermediate_size_key="moe_intermediate_size",
    norm_topk_prob=None,
)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "LlamaForCausalLM": Family(None, qk_norm=False, window=WindowRule.NEVER, rope_theta=1e4),
        "Qwen2ForCausalLM": Family(True, qk_norm=False, window=WindowRule.UPPER_LAYERS, rope_theta=1e4),
        "Qwen3ForCausalLM": Family(None, qk_norm=True, window=WindowRule.UPPER_LAYERS, rope_theta=1e4),
        "MixtralForCausalLM": Family(
            False, qk_norm=False, window=WindowRule.WHEN_SET, rope_theta=1e6, experts=_MIXTRAL_EXPERTS
        ),
        "Qwen3MoeForCausalLM": Family(
            None, qk_norm=True, window=WindowRule.WHEN_SWITCHED_ON, rope_theta=1e4, experts=_QWEN3_EXPERTS
        ),
    }
)
"""By the name that stands in `architectures` of config.json."""
