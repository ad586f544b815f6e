"""Limits and sizes of one engine, as a user writes them. What is measured at run time lives elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from core.errors import ConfigError

PRECISIONS: Mapping[str, Literal["int8", "int4"]] = MappingProxyType(
    {"int8": "int8", "w8a8": "int8", "int4": "int4", "w4a16": "int4"}
)
"""What the names of `quantization` stand for."""


@dataclass(frozen=True, slots=True)
class SpeculativeConfig:
    """Guessing of tokens, which are then verified: outputs stay what they are."""

    method: Literal["ngram", "suffix", "token_recycling", "draft_model"] | None = None
    """Guess what followed the same tokens before, in the request (ngram) or in any (suffix); what the model last drew
    after the same token (token_recycling); or what a smaller model says (draft_model). Null guesses nothing."""
    num_speculative_tokens: int = 8
    """Guesses for a request in one step, at most; fewer are made where they turn out not to pay."""
    prompt_lookup_min: int = 2
    """Tokens that must be the same (ngram, suffix)."""
    prompt_lookup_max: int = 8
    """Tokens beyond which it does not matter (ngram, suffix)."""
    model: str | None = None
    """Folder of the smaller model's checkpoint (draft_model)."""

    def __post_init__(self) -> None:
        path = "engine.speculative_config"
        for name in ("num_speculative_tokens", "prompt_lookup_min"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{path}.{name}", getattr(self, name), "must be >= 1")
        if self.prompt_lookup_max < self.prompt_lookup_min:
            fix = f"must be >= prompt_lookup_min = {self.prompt_lookup_min}"
            raise ConfigError(f"{path}.prompt_lookup_max", self.prompt_lookup_max, fix)
        if (self.method == "draft_model") != (self.model is not None):
            raise ConfigError(f"{path}.model", self.model, "must be set with method draft_model, and only then")


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Names and meanings are those that vLLM's users know."""

    block_size: int = 16
    """Tokens a KV block holds."""
    num_blocks: int | None = None
    """KV blocks; by default as many as `kv_cache_memory_gib` (CPU) or `gpu_memory_utilization` (GPU) allow."""
    kv_cache_memory_gib: float = 1.0
    """Memory for the KV cache on CPU, in GiB."""
    swap_space: float = 4.0
    """Host memory for K and V of requests that must give way to others, in GiB; pinned with a GPU, elsewhere taken as
    it is needed. With 0, or when it is full, they are computed anew."""
    gpu_memory_utilization: float = 0.9
    """Share of a GPU's memory that weights, activations and KV cache may take together."""
    max_num_batched_tokens: int = 512
    """Tokens one step may compute; longer prompts are prefilled in chunks."""
    max_num_seqs: int = 64
    """Requests a worker may hold at once."""
    max_model_len: int | None = None
    """Prompt and output together, in tokens; by default what the checkpoint says."""
    enable_prefix_caching: bool = True
    """Keep K and V of requests that are gone, for those that begin with the same tokens."""
    speculative_config: SpeculativeConfig = SpeculativeConfig()
    """Several tokens in a step, where they can be guessed."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of weights and activations; auto is float32 on CPU and the checkpoint's own on a GPU."""
    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = "auto"
    """Of the KV cache; auto is `dtype`. int8 keeps a scale for each vector of K and V."""
    quantization: Literal["int8", "w8a8", "int4", "w4a16"] | None = None
    """Round weights while loading: int8 with activations rounded row by row (w8a8), int4 in groups (w4a16). What a
    checkpoint holds as codes already stays as it is, and needs no setting."""
    quantize_lm_head: bool = True
    """With `quantization`, hold the output matrix in int8 too."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    num_threads: int | None = None
    """CPU threads for compute; by default the cores of the process, shared among the workers of the host."""

    def __post_init__(self) -> None:
        for name in ("block_size", "max_num_batched_tokens", "max_num_seqs"):
            if getattr(self, name) < 1:
                raise ConfigError(f"engine.{name}", getattr(self, name), "must be >= 1")
        for name in ("num_blocks", "max_model_len", "num_threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"engine.{name}", value, "must be >= 1, or left out")
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                "engine.max_num_batched_tokens",
                self.max_num_batched_tokens,
                f"must be >= max_num_seqs = {self.max_num_seqs}, or prompts wait while all of them decode",
            )
        if self.quantization not in (None, *PRECISIONS):
            raise ConfigError(
                "engine.quantization", self.quantization, f"must be one of {', '.join(PRECISIONS)}, or left out"
            )
        if not self.kv_cache_memory_gib > 0:
            raise ConfigError("engine.kv_cache_memory_gib", self.kv_cache_memory_gib, "must be > 0")
        if not self.swap_space >= 0:
            raise ConfigError("engine.swap_space", self.swap_space, "must be >= 0 GiB")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError("engine.gpu_memory_utilization", self.gpu_memory_utilization, "must be in (0, 1]")
