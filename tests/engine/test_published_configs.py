"""What well-known checkpoints say in config.json, and what the engine makes of it."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from engine.model_config import ModelConfig

SIZES = {"rms_norm_eps": 1e-6, "torch_dtype": "bfloat16", "use_cache": True, "attention_dropout": 0.0}
GEMMA = {
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
}
DEEPSEEK = {
    "attention_bias": False,
    "kv_lora_rank": 512,
    "moe_layer_freq": 1,
    "norm_topk_prob": False,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "rope_theta": 10000,
}


def shape(
    architecture: str, vocab: int, hidden: int, inner: int, layers: int, heads: int, kv_heads: int
) -> dict[str, Any]:
    return SIZES | {
        "architectures": [architecture],
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
    }


def read(folder: Path, config: dict[str, Any]) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(config))
    return ModelConfig.from_folder(folder)


def windows(config: ModelConfig) -> dict[int | None, int]:
    """How many layers have which."""
    every = [layer.window for layer in config.layers]
    return {window: every.count(window) for window in every}


def test_gemma_2_9b(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        shape("Gemma2ForCausalLM", 256000, 3584, 14336, 42, 16, 8)
        | GEMMA
        | {"max_position_embeddings": 8192, "sliding_window": 4096, "cache_implementation": "hybrid"}
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "rope_theta": 10000.0},
    )
    assert windows(config) == {4096: 21, None: 21}
    assert (config.attention_softcap, config.final_softcap, config.tie_word_embeddings) == (50.0, 30.0, True)
    assert (config.attention_scale, config.embedding_scale) == (1 / 16, math.sqrt(3584))


def test_gemma_3_1b(tmp_path: Path) -> None:
    config = read(
        tmp_path,
        shape("Gemma3ForCausalLM", 262144, 1152, 6912, 26, 4, 1)
        | GEMMA
        | {"max_position_embeddings": 32768, "sliding_window": 512, "sliding_window_pattern": 6, "rope_scaling": None}
        | {"rope_theta": 1000000, "rope_local_base_freq": 10000, "attn_logit_softcapping": None},
    )
    assert windows(config) == {512: 22, None: 4}
    assert {(layer.window, layer.rope.theta) for layer in config.layers} == {(512, 1e4), (None, 1e6)}


def test_phi_3_mini_128k(tmp_path: Path) -> None:
    factors = {"long_factor": [1.0 + i for i in range(48)], "short_factor": [1.0] * 48, "type": "longrope"}
    config = read(
        tmp_path,
        shape("Phi3ForCausalLM", 32064, 3072, 8192, 32, 32, 32)
        | {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "sliding_window": 262144}
        | {"hidden_act": "silu", "rope_theta": 10000.0, "rope_scaling": factors},
    )
    assert windows(config) == {None: 32}
    assert config.layers[0].rope.attention_factor == pytest.approx(math.sqrt(1 + 5 / 12))


def test_deepseek_v2_lite(tmp_path: Path) -> None:
    yarn = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 0.707, "mscale_all_dim": 0.707}
    config = read(
        tmp_path,
        shape("DeepseekV2ForCausalLM", 102400, 2048, 10944, 27, 16, 16)
        | DEEPSEEK
        | {"first_k_dense_replace": 1, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6}
        | {"moe_intermediate_size": 1408, "n_group": 1, "topk_group": 1, "topk_method": "greedy", "q_lora_rank": None}
        | {"routed_scaling_factor": 1.0, "scoring_func": "softmax", "seq_aux": True, "max_position_embeddings": 163840}
        | {"rope_scaling": yarn | {"original_max_position_embeddings": 4096, "type": "yarn"}},
    )
    assert config.latent is not None
    assert config.moe is not None
    assert [layer.has_experts for layer in config.layers] == [False] + [True] * 26
    assert (config.moe.shared_size, config.moe.num_groups, config.max_position) == (2816, 1, 163840)
    assert config.layers[0].rope.attention_factor == 1.0
    assert config.attention_scale == pytest.approx((0.0707 * math.log(40) + 1) ** 2 / math.sqrt(192))


def test_gpt_oss_20b(tmp_path: Path) -> None:
    yarn = {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "rope_type": "yarn", "truncate": False}
    config = read(
        tmp_path,
        shape("GptOssForCausalLM", 201088, 2880, 2880, 24, 64, 8)
        | {"attention_bias": True, "experts_per_token": 4, "head_dim": 64, "hidden_act": "silu", "sliding_window": 128}
        | {"initial_context_length": 4096, "layer_types": ["sliding_attention", "full_attention"] * 12}
        | {"max_position_embeddings": 131072, "num_experts_per_tok": 4, "num_local_experts": 32, "swiglu_limit": 7.0}
        | {"rope_scaling": yarn | {"original_max_position_embeddings": 4096}, "rope_theta": 150000}
        | {"quantization_config": {"modules_to_not_convert": ["model.layers.*.mlp.router"], "quant_method": "mxfp4"}},
    )
    assert windows(config) == {128: 12, None: 12}
    assert (config.qkv_bias, config.output_bias, config.max_position) == (True, True, 131072)
    assert config.layers[0].rope.attention_factor == pytest.approx(1.3465736)
    assert config.quantization is not None
    assert config.quantization.scheme("model.layers.3.mlp.experts.gate_up_proj") is not None
    assert config.quantization.scheme("model.layers.3.self_attn.q_proj") is None


def test_qwen_2_5_7b_in_gptq(tmp_path: Path) -> None:
    gptq = {"bits": 4, "damp_percent": 0.01, "desc_act": False, "group_size": 128, "model_name_or_path": None}
    config = read(
        tmp_path,
        shape("Qwen2ForCausalLM", 152064, 3584, 18944, 28, 28, 4)
        | {"max_position_embeddings": 32768, "max_window_layers": 28, "rope_theta": 1000000.0, "sliding_window": 131072}
        | {"use_sliding_window": False, "hidden_act": "silu", "tie_word_embeddings": False}
        | {"quantization_config": gptq | {"quant_method": "gptq", "static_groups": False, "sym": True}},
    )
    assert windows(config) == {None: 28}
    assert (config.qkv_bias, config.output_bias, config.head_size) == (True, False, 128)
    assert config.quantization is not None


def test_a_llama_in_w4a16(tmp_path: Path) -> None:
    weights = {"actorder": None, "block_structure": None, "dynamic": False, "group_size": 128, "num_bits": 4}
    group = {
        "input_activations": None,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": weights | {"observer": "minmax", "strategy": "group", "symmetric": True, "type": "int"},
    }
    llama3 = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3"}
    config = read(
        tmp_path,
        shape("LlamaForCausalLM", 128256, 4096, 14336, 32, 32, 8)
        | {"attention_bias": False, "mlp_bias": False, "pretraining_tp": 1, "max_position_embeddings": 131072}
        | {"rope_scaling": llama3 | {"original_max_position_embeddings": 8192}, "rope_theta": 500000.0}
        | {
            "quantization_config": {
                "config_groups": {"group_0": group},
                "format": "pack-quantized",
                "ignore": ["lm_head"],
                "kv_cache_scheme": None,
                "quant_method": "compressed-tensors",
                "quantization_status": "compressed",
                "sparsity_config": {},
            }
        },
    )
    assert config.quantization is not None
    assert config.quantization.scheme("lm_head") is None
    scheme = config.quantization.scheme("model.layers.0.mlp.down_proj")
    assert scheme is not None
    assert (scheme.method, scheme.num_bits, scheme.group_size) == ("packed", 4, 128)
