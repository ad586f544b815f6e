"""Random small checkpoints of every family, and what transformers makes of them.

PENSTOCK_TEST_DEVICE=cuda runs the same tests on a GPU.
"""

import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 8.0,
}
DEEPSEEK = {
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 20,
    "first_k_dense_replace": 1,
    "n_shared_experts": 2,
    "n_group": 4,
    "topk_group": 2,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 12,
    "v_head_dim": 16,
}
VARIANTS: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": ("Llama", {"head_dim": 24, "num_key_value_heads": 1, "vocab_size": 211}, "1GB"),
    "llama_bias_linear_rope": (
        "Llama",
        {
            "attention_bias": True,
            "tie_word_embeddings": True,
            "rope_parameters": {"rope_type": "linear", "factor": 4.0},
        },
        "1GB",
    ),
    "llama3_rope": (
        "Llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
        "1GB",
    ),
    "mistral": ("Mistral", {"head_dim": 20, "sliding_window": 9}, "1GB"),
    "qwen2": ("Qwen2", {"vocab_size": 199, "num_hidden_layers": 3}, "60KB"),
    "qwen2_window_yarn": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 21, "max_window_layers": 1, "rope_parameters": YARN},
        "1GB",
    ),
    "qwen3": ("Qwen3", {"head_dim": 40, "tie_word_embeddings": True, "rms_norm_eps": 1e-5}, "1GB"),
    "gemma2": (
        "Gemma2",
        {
            "head_dim": 24,
            "query_pre_attn_scalar": 40,
            "sliding_window": 13,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 2.0,
            "num_hidden_layers": 3,
        },
        "1GB",
    ),
    "gemma3": (
        "Gemma3",
        {
            "head_dim": 20,
            "num_key_value_heads": 1,
            "query_pre_attn_scalar": 30,
            "sliding_window": 11,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "num_hidden_layers": 3,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
            "tie_word_embeddings": True,
        },
        "1GB",
    ),
    "phi3": ("Phi3", {"num_key_value_heads": 1, "sliding_window": 17, "pad_token_id": None}, "1GB"),
    "phi3_long_partial_rope": (
        "Phi3",
        {
            "original_max_position_embeddings": 32,
            "pad_token_id": None,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0] * 6,
                "long_factor": [1.0, 1.1, 1.5, 2.0, 4.0, 7.0],
            },
        },
        "1GB",
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": 30}, "1GB"),
    "qwen3_moe": (
        "Qwen3Moe",
        {
            "head_dim": 24,
            "num_hidden_layers": 3,
            "num_experts": 7,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 36,
            "mlp_only_layers": [1],
        },
        "100KB",
    ),
    "qwen3_moe_sparse_step": (
        "Qwen3Moe",
        {
            "head_dim": 16,
            "num_hidden_layers": 2,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "decoder_sparse_step": 2,
            "norm_topk_prob": True,
            "tie_word_embeddings": True,
        },
        "1GB",
    ),
    "olmoe": ("Olmoe", {"num_experts": 6, "num_experts_per_tok": 3, "intermediate_size": 28}, "1GB"),
    "deepseek_v2": (
        "DeepseekV2",
        {**DEEPSEEK, "q_lora_rank": None, "topk_method": "group_limited_greedy", "routed_scaling_factor": 3.0},
        "1GB",
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            **DEEPSEEK,
            "q_lora_rank": 28,
            "attention_bias": True,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
        },
        "1GB",
    ),
    "gpt_oss": (
        "GptOss",
        {
            "head_dim": 24,
            "sliding_window": 11,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "rope_parameters": {**YARN, "truncate": False},
        },
        "1GB",
    ),
}
"""Name of the variant: family, what is odd about it, and the size of a shard."""

COMMON = {
    "vocab_size": 223,
    "hidden_size": 64,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": None,
}


@dataclass(frozen=True)
class Reference:
    """A checkpoint folder and the float32 model of transformers that was written into it."""

    folder: Path
    model: Any

    def greedy(self, prompts: list[list[int]], num_tokens: int) -> tuple[list[list[int]], torch.Tensor]:
        """The next `num_tokens` of each prompt, and the logits [prompts, num_tokens, V] they come from."""
        device, longest = self.model.device, max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=device)
        out = self.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=num_tokens,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return out.sequences[:, longest:].tolist(), torch.stack(out.logits, dim=1).float().cpu()

    @torch.inference_mode()
    def logits(self, token_ids: list[int]) -> torch.Tensor:
        """[T, V] float32"""
        logits: torch.Tensor = self.model(torch.tensor([token_ids], device=self.model.device)).logits[0]
        return logits.float().cpu()


NEAR_TIES = pytest.StashKey[Counter[str]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[NEAR_TIES] = Counter()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    counts = config.stash[NEAR_TIES]
    if counts:
        text = "greedy outputs that left transformers' at a near-tie: {ties} of {outputs}"
        terminalreporter.write_line(text.format_map({"ties": counts["ties"], "outputs": counts["outputs"]}))


@pytest.fixture
def near_ties(request: pytest.FixtureRequest) -> Counter[str]:
    """`ties` and `outputs`, summed over all tests; reported at the end."""
    return request.config.stash[NEAR_TIES]


@pytest.fixture(scope="session")
def device() -> torch.device:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.set_num_threads(1)  # small models: more threads only wait for each other
    return torch.device(os.environ.get("PENSTOCK_TEST_DEVICE", "cpu"))


@pytest.fixture(scope="session", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    """A test that takes this runs for each of them."""
    name: str = request.param
    return name


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory, device: torch.device) -> Callable[[str], Reference]:
    """Makes the checkpoint of a variant, once."""
    made: dict[str, Reference] = {}

    def get(variant: str) -> Reference:
        if variant not in made:
            made[variant] = _make(variant, tmp_path_factory.mktemp(variant), device)
        return made[variant]

    return get


def _make(variant: str, folder: Path, device: torch.device) -> Reference:
    import transformers

    logging: Any = transformers.logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    family, odd, shard_size = VARIANTS[variant]
    kind = f"{family}TextConfig" if hasattr(transformers, f"{family}TextConfig") else f"{family}Config"
    config = getattr(transformers, kind)(**{**COMMON, **odd})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(sum(map(ord, variant)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _randomize_(name, parameter, generator)
            if family.startswith("Gemma"):
                _shift_gemma_(name, parameter)
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):  # or it stays zero
                buffer.copy_(0.2 * torch.randn(buffer.shape, generator=generator))
    model.save_pretrained(folder, max_shard_size=shard_size)
    return Reference(folder, model.to(device))


def _randomize_(name: str, parameter: torch.Tensor, generator: torch.Generator) -> None:
    """Large enough that outputs vary from prompt to prompt and every tensor matters."""
    noise = torch.randn(parameter.shape, generator=generator)
    if "norm" in name:
        parameter.copy_(1 + 0.2 * noise)
    elif "embed" in name:
        parameter.copy_(0.15 * noise)  # else a tied model repeats its input
    elif parameter.dim() == 1:
        parameter.copy_(0.5 * noise)
    else:
        parameter.copy_(1.5 * noise / parameter.shape[-1] ** 0.5)


def _shift_gemma_(name: str, parameter: torch.Tensor) -> None:
    """It adds 1 to norms, and multiplies embeddings by 8: a tied model would repeat its input."""
    if "embed" in name:
        parameter.mul_(0.05)
    elif "norm" in name:
        parameter.sub_(1)
        if name == "model.norm.weight":
            parameter.add_(9)
