"""DeepSeek-V2 and V3 (DeepSeek-AI, 2024)."""

from dataclasses import replace

from engine.families.family import ExpertNames, Family, Routing
from engine.families.layer_rules import after_first_dense

_EXPERTS = ExpertNames(shared="mlp.shared_experts", num_experts_key="n_routed_experts", layers=after_first_dense)

DEEPSEEK_V2 = Family(
    "DeepseekV2ForCausalLM",
    defaults={"topk_method": "greedy"},
    only={
        "topk_method": ("greedy", "group_limited_greedy"),
        "norm_topk_prob": (False,),
        "scoring_func": ("softmax",),
        "moe_layer_freq": (1,),
        "mlp_bias": (False,),
    },
    attention_bias="config",
    latent=True,
    experts=replace(_EXPERTS, routing=Routing(renormalize=False, group_score="best")),
)

DEEPSEEK_V3 = Family(
    "DeepseekV3ForCausalLM",
    defaults={"norm_topk_prob": True, "routed_scaling_factor": 2.5, "n_group": 8, "topk_group": 4},
    only={
        "topk_method": ("noaux_tc",),
        "scoring_func": ("sigmoid",),
        "moe_layer_freq": (1,),
        "rope_interleave": (True, False),
    },
    attention_bias="config",
    latent=True,
    experts=replace(
        _EXPERTS,
        routing=Routing("sigmoid", group_score="sum of best two", bias="mlp.gate.e_score_correction_bias"),
    ),
)
