"""What config.json and generation_config.json may say, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from core.errors import CheckpointError, ConfigError
from core.model_info import SamplingDefaults
from engine.families import FAMILIES
from engine.model_config import ModelConfig, model_info
from engine.rope_config import RopeConfig

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
WINDOW = {"sliding_window": 128, "use_sliding_window": True}
MISTRAL = LLAMA | {"architectures": ["MistralForCausalLM"]}
PHI3 = LLAMA | {"architectures": ["Phi3ForCausalLM"], "original_max_position_embeddings": 128}
GEMMA2 = LLAMA | {"architectures": ["Gemma2ForCausalLM"], "hidden_activation": "gelu_pytorch_tanh"}
GEMMA3 = GEMMA2 | {"architectures": ["Gemma3ForCausalLM"]}
OLMOE = LLAMA | {"architectures": ["OlmoeForCausalLM"], "num_experts": 8, "num_experts_per_tok": 2}
DEEPSEEK_V2 = LLAMA | {
    "architectures": ["DeepseekV2ForCausalLM"],
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_group": 4,
    "topk_group": 2,
}
DEEPSEEK_V3 = DEEPSEEK_V2 | {"architectures": ["DeepseekV3ForCausalLM"]}
GPT_OSS = LLAMA | {"architectures": ["GptOssForCausalLM"], "num_local_experts": 8, "num_experts_per_tok": 2}
QWEN2 = LLAMA | {"architectures": ["Qwen2ForCausalLM"]}
MIXTRAL = LLAMA | {"architectures": ["MixtralForCausalLM"], "num_local_experts": 8, "num_experts_per_tok": 2}
QWEN3_MOE = LLAMA | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
}


def read(folder: Path, config: dict[str, Any], generation: dict[str, Any] | None = None) -> ModelConfig:
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation))
    return ModelConfig.from_folder(folder)


def rope(config: ModelConfig) -> RopeConfig:
    """That of the first layer."""
    return config.layers[0].rope


def windows(config: ModelConfig) -> list[int | None]:
    return [layer.window for layer in config.layers]


def test_what_older_files_leave_out_has_transformers_defaults(tmp_path: Path) -> None:
    config = read(tmp_path, {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"})
    assert (config.num_kv_heads, config.head_size, config.layers[0].rope) == (4, 16, RopeConfig(10000.0, 16))
    assert (config.tie_word_embeddings, config.qkv_bias, config.dtype, config.moe) == (False, False, "float32", None)


def test_rope_is_read_from_either_spelling(tmp_path: Path) -> None:
    new = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}}
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert rope(read(tmp_path, LLAMA | new)) == rope(read(tmp_path, LLAMA | old)) == RopeConfig(5e5, 16, "linear", 2.0)


def test_dtype_is_read_from_either_spelling(tmp_path: Path) -> None:
    assert read(tmp_path, LLAMA | {"dtype": "bfloat16"}).dtype == "bfloat16"
    assert read(tmp_path, LLAMA | {"torch_dtype": "float16"}).dtype == "float16"


def test_llama3_scaling_keeps_all_its_numbers(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = read(tmp_path, LLAMA | {"rope_scaling": scaling | {"original_max_position_embeddings": 128}})
    assert rope(config) == RopeConfig(
        10000.0, 16, "llama3", 8.0, original_max_position=128, low_freq_factor=1.0, high_freq_factor=4.0
    )


def test_biases_are_those_of_the_family(tmp_path: Path) -> None:
    flags = {
        name: (config.qkv_bias, config.output_bias)
        for name, base in {"llama": LLAMA, "qwen2": QWEN2, "mixtral": MIXTRAL}.items()
        for config in [read(tmp_path, base | {"attention_bias": True})]
    }
    assert flags == {"llama": (True, True), "qwen2": (True, False), "mixtral": (False, False)}


def test_expert_layers_follow_step_and_exceptions(tmp_path: Path) -> None:
    config = read(tmp_path, QWEN3_MOE | {"decoder_sparse_step": 2, "mlp_only_layers": [3]})
    assert config.moe is not None
    assert [layer.has_experts for layer in config.layers] == [False, True, False, False]
    assert (config.moe.renormalize, config.moe.intermediate_size) == (False, 32)


def test_mixtral_normalizes_expert_weights_and_has_experts_everywhere(tmp_path: Path) -> None:
    config = read(tmp_path, MIXTRAL)
    assert config.moe is not None
    assert all(layer.has_experts for layer in config.layers)
    assert (config.moe.renormalize, config.moe.intermediate_size) == (True, 96)


@pytest.mark.parametrize(
    ("generation", "eos", "defaults"),
    [
        (None, (7,), SamplingDefaults()),
        ({}, (7,), SamplingDefaults()),
        ({"eos_token_id": 9}, (9,), SamplingDefaults()),
        ({"eos_token_id": [9, 8, 9]}, (9, 8), SamplingDefaults()),
        ({"temperature": 0.6, "top_p": 0.95, "top_k": 20}, (7,), SamplingDefaults(0.6, 0.95, 20)),
        ({"temperature": 0}, (7,), SamplingDefaults(temperature=0.0)),
    ],
)
def test_generation_config(
    tmp_path: Path, generation: dict[str, Any] | None, eos: tuple[int, ...], defaults: SamplingDefaults
) -> None:
    config = read(tmp_path, LLAMA | {"eos_token_id": 7}, generation)
    assert (config.eos_token_ids, config.defaults) == (eos, defaults)


def test_an_unknown_architecture_is_named_with_those_supported(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as error:
        read(tmp_path, LLAMA | {"architectures": ["GPT2LMHeadModel"]})
    assert all(name in str(error.value) for name in ["GPT2LMHeadModel", *FAMILIES])


@pytest.mark.parametrize(
    ("base", "change", "words"),
    [
        (LLAMA, {"architectures": None}, "architectures: is missing"),
        (LLAMA, {"hidden_size": None}, "hidden_size: is missing"),
        (LLAMA, {"hidden_size": "64"}, "hidden_size: got '64', must be an integer"),
        (LLAMA, {"hidden_size": True}, "hidden_size: got True"),
        (LLAMA, {"num_hidden_layers": 0}, "num_hidden_layers: got 0"),
        (LLAMA, {"num_key_value_heads": 3}, "num_key_value_heads: got 3, must divide"),
        (LLAMA, {"head_dim": 15}, "head_dim: got 15, must be even"),
        (LLAMA, {"rms_norm_eps": -1}, "rms_norm_eps: got -1"),
        (LLAMA, {"tie_word_embeddings": "no"}, "tie_word_embeddings: got 'no'"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act: got 'gelu'"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias"),
        (LLAMA, {"vocab_size": 2**19}, "vocab_size: got 524288, must be below"),
        (LLAMA, {"dtype": "float8_e4m3fn"}, "dtype: got 'float8_e4m3fn'"),
        (LLAMA, {"quantization_config": {"quant_method": "fp8"}}, "quantization_config.quant_method: got 'fp8'"),
        (LLAMA, {"partial_rotary_factor": 0.2}, "partial_rotary_factor: got 0.2, must leave an even part"),
        (LLAMA, {"rope_scaling": {"rope_type": "yarn", "factor": -4.0}}, "rope_scaling.factor: got -4.0"),
        (LLAMA, {"rope_scaling": {"type": "spiral", "factor": 4.0}}, "rope_scaling.type: got 'spiral'"),
        (PHI3, {"rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8}}, "long_factor: is missing"),
        (LLAMA, {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor: is missing"),
        (LLAMA, {"rope_parameters": {"factor": 2.0}}, "type: is missing"),
        (LLAMA, {"rope_parameters": [1]}, "rope_parameters: got"),
        (MIXTRAL, {"sliding_window": "wide"}, "sliding_window: got 'wide'"),
        (MIXTRAL, {"num_experts_per_tok": 9}, "num_experts_per_tok: got 9, must be <= num_local_experts"),
        (QWEN2, {"sliding_window": 128, "use_sliding_window": True, "layer_types": ["full_attention"]}, "layer_types"),
        (GEMMA2, {"layer_types": ["chunked_attention"] * 4}, "layer_types: got"),
        (GEMMA2, {"hidden_activation": "gelu"}, "hidden_activation: got 'gelu', must be 'gelu_pytorch_tanh'"),
        (OLMOE, {"clip_qkv": 8.0}, "clip_qkv: got 8.0, must be left out"),
        (DEEPSEEK_V2, {"norm_topk_prob": True}, "norm_topk_prob: got True, must be False or left out"),
        (DEEPSEEK_V2, {"kv_lora_rank": None}, "kv_lora_rank: is missing"),
        (DEEPSEEK_V3, {"scoring_func": "softmax"}, "scoring_func: got 'softmax'"),
        (DEEPSEEK_V3, {"n_group": 3}, "n_group: got 3, must divide n_routed_experts (8)"),
        (DEEPSEEK_V3, {"num_experts_per_tok": 5}, "topk_group: got 2, must leave at least num_experts_per_tok (5)"),
        (GPT_OSS, {"swiglu_limit": 5.0}, "swiglu_limit: got 5.0, must be 7.0 or left out"),
        (QWEN3_MOE, {"moe_intermediate_size": None}, "moe_intermediate_size: is missing"),
        (QWEN3_MOE, {"mlp_only_layers": ["x"]}, "mlp_only_layers: got"),
    ],
)
def test_what_would_go_wrong_is_refused(
    tmp_path: Path, base: dict[str, Any], change: dict[str, Any], words: str
) -> None:
    with pytest.raises(CheckpointError) as error:
        read(tmp_path, base | change)
    assert str(error.value).startswith(f"{tmp_path}/config.json: ")
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("base", "change", "expected"),
    [
        (LLAMA, {"sliding_window": 128}, [None] * 4),
        (MISTRAL, {"sliding_window": 128}, [128] * 4),
        (MISTRAL, {"max_position_embeddings": 8192}, [4096] * 4),
        (MISTRAL, {"sliding_window": None}, [None] * 4),
        (MIXTRAL, {"sliding_window": 512}, [None] * 4),
        (MIXTRAL, {"sliding_window": None}, [None] * 4),
        (QWEN2, WINDOW | {"use_sliding_window": False}, [None] * 4),
        (QWEN2, WINDOW, [None] * 4),
        (QWEN2, WINDOW | {"max_window_layers": 2}, [None, None, 128, 128]),
        (QWEN2, WINDOW | {"layer_types": ["full_attention"] * 4}, [None] * 4),
        (QWEN2, WINDOW | {"layer_types": ["sliding_attention", "full_attention"] * 2}, [128, None, 128, None]),
        (QWEN3_MOE, WINDOW, [128] * 4),
        (GEMMA2, WINDOW, [128, None, 128, None]),
        (GEMMA3, WINDOW | {"sliding_window_pattern": 3}, [128, 128, None, 128]),
        (GPT_OSS, {}, [128, None, 128, None]),
    ],
)
def test_windows_are_those_of_the_family(
    tmp_path: Path, base: dict[str, Any], change: dict[str, Any], expected: list[int | None]
) -> None:
    assert windows(read(tmp_path, base | change)) == expected


def test_layers_with_a_window_may_have_a_rotary_base_of_their_own(tmp_path: Path) -> None:
    old = {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    new = {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }
    }
    for change in (old, new):
        config = read(tmp_path, GEMMA3 | WINDOW | {"sliding_window_pattern": 2} | change)
        local, everywhere = RopeConfig(1e4, 256), RopeConfig(1e6, 256, "linear", 8.0)
        assert [layer.rope for layer in config.layers] == [local, everywhere] * 2


def test_a_context_that_yarn_stretches_counts(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    assert read(tmp_path, LLAMA | {"rope_scaling": yarn}).max_position == 2048


def test_absent_and_null_differ_where_the_family_has_a_default(tmp_path: Path) -> None:
    softcaps = [read(tmp_path, GEMMA2 | change).attention_softcap for change in ({}, {"attn_logit_softcapping": None})]
    assert softcaps == [50.0, None]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temperature": "hot"}, "temperature: got 'hot'"),
        ({"top_p": 2}, "top_p: got 2"),
        ({"top_k": -5}, "top_k: got -5"),
        ({"eos_token_id": "</s>"}, "eos_token_id: got '</s>'"),
    ],
)
def test_a_malformed_generation_config_is_refused(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(CheckpointError, match=r"generation_config\.json") as error:
        read(tmp_path, LLAMA, change)
    assert words in str(error.value)


def test_a_missing_folder_and_broken_json_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"nowhere/config\.json: no such file"):
        ModelConfig.from_folder(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text('{"architectures": [')
    with pytest.raises(CheckpointError, match=r"config\.json: can't be read as JSON"):
        ModelConfig.from_folder(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match=r"config\.json: can't be read as JSON"):
        ModelConfig.from_folder(tmp_path)


def test_model_info_limits_the_length(reference: Any) -> None:
    folder = reference("qwen2").folder
    info = model_info(folder, "mine", max_model_len=100)
    assert (info.name, info.architecture, info.max_model_len) == ("mine", "Qwen2ForCausalLM", 100)
    assert model_info(folder, "mine").max_model_len == 256
    with pytest.raises(ConfigError, match=r"engine.max_model_len: got 1000, must be <= 256"):
        model_info(folder, "mine", max_model_len=1000)
