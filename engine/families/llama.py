"""Llama 2 and 3 (Touvron et al., 2023; Llama team, 2024)."""

from engine.families.family import Family

LLAMA = Family("LlamaForCausalLM", attention_bias="config", only={"mlp_bias": (False,)})
