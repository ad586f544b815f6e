"""Qwen 2, 2.5 and 3, dense and with experts (Qwen team, 2024; 2025)."""

from engine.families.family import ExpertNames, Family
from engine.families.layer_rules import by_sparse_step, sliding_in_upper_layers, sliding_when_switched_on

QWEN2 = Family(
    "Qwen2ForCausalLM",
    defaults={"sliding_window": 4096},
    only={"dual_chunk_attention_config": ()},
    layer_types=sliding_in_upper_layers,
    attention_bias="qkv",
)

QWEN3 = Family(
    "Qwen3ForCausalLM",
    defaults={"sliding_window": 4096, "head_dim": 128},
    layer_types=sliding_in_upper_layers,
    attention_bias="config",
    qk_norm="head",
)

QWEN3_MOE = Family(
    "Qwen3MoeForCausalLM",
    defaults={"sliding_window": 4096},
    layer_types=sliding_when_switched_on,
    attention_bias="config",
    qk_norm="head",
    experts=ExpertNames(layers=by_sparse_step),
)
