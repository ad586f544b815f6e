"""Gemma 2 and 3, text (Gemma team, 2024; 2025)."""

from engine.families.family import SANDWICH, Family
from engine.families.layer_rules import every_nth_full

_DEFAULTS = {
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "tie_word_embeddings": True,
}

GEMMA2 = Family(
    "Gemma2ForCausalLM",
    defaults=_DEFAULTS | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    only={"use_bidirectional_attention": (False,)},
    layer_types=every_nth_full(2),
    attention_bias="config",
    norms=SANDWICH,
    norm_offset=1.0,
    scale_embedding=True,
    activation="gelu_tanh",
)

GEMMA3 = Family(
    "Gemma3ForCausalLM",
    defaults=_DEFAULTS | {"rope_theta": 1e6, "rope_local_base_freq": 1e4},
    only={"use_bidirectional_attention": (False,), "attn_logit_softcapping": ()},
    layer_types=every_nth_full(6),
    attention_bias="config",
    qk_norm="head",
    norms=SANDWICH,
    norm_offset=1.0,
    scale_embedding=True,
    activation="gelu_tanh",
)
