"""What config.json and generation_config.json may say, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from core.errors import CheckpointError, ConfigError
from core.model_info import SamplingDefaults
from engine.families import FAMILIES
from engine.model_config import ModelConfig, RopeConfig, model_info

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


def test_what_older_files_leave_out_has_transformers_defaults(tmp_path: Path) -> None:
    config = read(tmp_path, {k: v for k, v in LLAMA.items() if k != "num_key_value_heads"})
    assert (config.num_kv_heads, config.head_size, config.rope) == (4, 16, RopeConfig(10000.0))
    assert (config.tie_word_embeddings, config.qkv_bias, config.dtype, config.moe) == (False, False, "float32", None)


def test_rope_is_read_from_either_spelling(tmp_path: Path) -> None:
    new = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}}
    old = {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    assert read(tmp_path, LLAMA | new).rope == read(tmp_path, LLAMA | old).rope == RopeConfig(5e5, "linear", 2.0)


def test_dtype_is_read_from_either_spelling(tmp_path: Path) -> None:
    assert read(tmp_path, LLAMA | {"dtype": "bfloat16"}).dtype == "bfloat16"
    assert read(tmp_path, LLAMA | {"torch_dtype": "float16"}).dtype == "float16"


def test_llama3_scaling_keeps_all_its_numbers(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope = read(tmp_path, LLAMA | {"rope_scaling": scaling | {"original_max_position_embeddings": 128}}).rope
    assert rope == RopeConfig(10000.0, "llama3", 8.0, 1.0, 4.0, 128)


def test_biases_are_those_of_the_family(tmp_path: Path) -> None:
    flags = {
        name: (config.qkv_bias, config.output_bias)
        for name, base in {"llama": LLAMA, "qwen2": QWEN2, "mixtral": MIXTRAL}.items()
        for config in [read(tmp_path, base | {"attention_bias": True})]
    }
    assert flags == {"llama": (True, True), "qwen2": (True, False), "mixtral": (False, False)}


def test_expert_layers_follow_step_and_exceptions(tmp_path: Path) -> None:
    moe = read(tmp_path, QWEN3_MOE | {"decoder_sparse_step": 2, "mlp_only_layers": [3]}).moe
    assert moe is not None
    assert (moe.layers, moe.norm_topk_prob, moe.intermediate_size) == (frozenset({1}), False, 32)


def test_mixtral_normalizes_expert_weights_and_has_experts_everywhere(tmp_path: Path) -> None:
    moe = read(tmp_path, MIXTRAL).moe
    assert moe is not None
    assert (moe.layers, moe.norm_topk_prob, moe.intermediate_size) == (frozenset(range(4)), True, 96)


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
        (LLAMA, {"quantization_config": {"quant_method": "awq"}}, "quantized checkpoints are not supported"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        (LLAMA, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_scaling.rope_type: got 'yarn'"),
        (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope_scaling.type: got 'dynamic'"),
        (LLAMA, {"rope_parameters": {"rope_type": "linear"}}, "rope_parameters.factor: is missing"),
        (LLAMA, {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "type: is missing"),
        (LLAMA, {"rope_parameters": [1]}, "rope_parameters: got"),
        (MIXTRAL, {"sliding_window": 128}, "sliding_window: got 128"),
        (MIXTRAL, {"num_experts_per_tok": 9}, "num_experts_per_tok: got 9, must be <= num_local_experts"),
        (QWEN2, {"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 2}, "sliding_window: got 128"),
        (QWEN2, {"sliding_window": 128, "use_sliding_window": True, "layer_types": ["sliding_attention"]}, "got 128"),
        (QWEN3_MOE, {"sliding_window": 128, "use_sliding_window": True}, "sliding_window: got 128"),
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
    ("base", "change"),
    [
        (LLAMA, {"sliding_window": 128}),
        (MIXTRAL, {"sliding_window": 512}),
        (MIXTRAL, {"sliding_window": None}),
        (QWEN2, {"sliding_window": 128, "use_sliding_window": False}),
        (QWEN2, {"sliding_window": 128, "use_sliding_window": True, "max_window_layers": 4}),
        (QWEN2, {"sliding_window": 128, "use_sliding_window": True, "layer_types": ["full_attention"] * 4}),
    ],
)
def test_a_window_without_effect_is_no_obstacle(tmp_path: Path, base: dict[str, Any], change: dict[str, Any]) -> None:
    assert read(tmp_path, base | change).max_position == 512


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
