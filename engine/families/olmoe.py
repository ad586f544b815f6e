"""OLMoE (Muennighoff et al., 2024)."""

from engine.families.family import ExpertNames, Family

OLMOE = Family(
    "OlmoeForCausalLM",
    only={"clip_qkv": ()},
    attention_bias="config",
    qk_norm="full",
    experts=ExpertNames(intermediate_size_key="intermediate_size"),
)
