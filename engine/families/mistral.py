"""Mistral and Mixtral (Jiang et al., 2023; 2024)."""

from engine.families.family import ExpertNames, Family, Routing
from engine.families.layer_rules import sliding_when_set

MISTRAL = Family("MistralForCausalLM", defaults={"sliding_window": 4096}, layer_types=sliding_when_set)

MIXTRAL = Family(
    "MixtralForCausalLM",
    defaults={"rope_theta": 1e6},
    layer_types=sliding_when_set,
    experts=ExpertNames(
        router="block_sparse_moe.gate",
        expert="block_sparse_moe.experts.{}",
        gate="w1",
        up="w3",
        down="w2",
        num_experts_key="num_local_experts",
        intermediate_size_key="intermediate_size",
        routing=Routing(renormalize=True),
    ),
)
