"""gpt-oss (OpenAI, 2025)."""

from engine.families.family import ExpertNames, Family, Routing
from engine.families.layer_rules import every_nth_full

GPT_OSS = Family(
    "GptOssForCausalLM",
    defaults={"head_dim": 64, "attention_bias": True, "sliding_window": 128, "rope_theta": 150000.0},
    only={"swiglu_limit": (7.0,), "swiglu_alpha": (1.702,)},
    layer_types=every_nth_full(2),
    attention_bias="config",
    sinks=True,
    activation="swigluoai",
    experts=ExpertNames(
        router="mlp.router",
        router_bias=True,
        expert="mlp.experts",
        stacked=True,
        num_experts_key="num_local_experts",
        intermediate_size_key="intermediate_size",
        routing=Routing(renormalize=True),
    ),
)
