"""Phi-3 and Phi-4-mini (Abdin et al., 2024)."""

from engine.families.family import Family
from engine.families.layer_rules import sliding_when_set

PHI3 = Family("Phi3ForCausalLM", layer_types=sliding_when_set, fused=True)
