"""A checkpoint folder as a model on a device, and what its K and V look like."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from core.errors import ConfigError
from core.kv_layout import KVLayout
from engine.checkpoint import Checkpoint
from engine.config import PRECISIONS, EngineConfig
from engine.model import Model
from engine.model_config import Dtype, ModelConfig
from engine.weights import Storage, load_weights


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """`max_model_len` is the least of the model's length and the configured one."""

    config: ModelConfig
    layout: KVLayout
    model: Model
    device: torch.device
    max_model_len: int


def load_model(path: str | Path, config: EngineConfig) -> LoadedModel:
    """Raises `CheckpointError` for a folder that can't be served, and `ConfigError` for what can't be configured."""
    model_config = ModelConfig.from_folder(path)
    latent, limit, device = model_config.latent, model_config.max_model_len(config.max_model_len), _device(config)
    own_dtype = "float32" if device.type == "cpu" else model_config.dtype
    dtype = own_dtype if config.dtype == "auto" else config.dtype
    weights_in = _storage(config, dtype, device)
    layout = KVLayout(
        model=Path(path).resolve().name,
        fingerprint=Checkpoint.open(path).fingerprint(),
        num_layers=model_config.num_layers,
        num_kv_heads=model_config.num_kv_heads if latent is None else 1,
        head_size=model_config.head_size if latent is None else latent.kv_rank + latent.rope_size,
        block_size=config.block_size,
        dtype=dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype,
        kind="heads" if latent is None else "latent",
        weights=weights_in.precision,
    )
    model = Model(model_config, load_weights(path, model_config, weights_in), weights_in, limit)
    return LoadedModel(model_config, layout, model, device, limit)


def _storage(config: EngineConfig, dtype: Dtype, device: torch.device) -> Storage:
    """On CPU all computing is in float32, whatever weights are held in."""
    quantized = None if config.quantization is None else PRECISIONS[config.quantization]
    return Storage(
        precision=quantized or dtype,
        head_precision="int8" if quantized is not None and config.quantize_lm_head else dtype,
        dtype=torch.float32 if device.type == "cpu" else getattr(torch, dtype),
        device=device,
    )


def _device(config: EngineConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("engine.device", "cuda", "but torch sees no GPU here; use 'cpu' or 'auto'")
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)
