"""Weights in memory, and how they get there from a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from core.errors import CheckpointError
from engine.checkpoint import Checkpoint
from engine.model_config import ModelConfig
from engine.parameters import (
    Parameter,
    attention_parameters,
    checkpoint_tensors,
    mlp_parameters,
    model_parameters,
)

_DTYPES = ("F32", "BF16", "F16")
_UNUSED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")  # computed from config.json


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """C hidden size, H query heads, K KV heads, D head size."""

    input_norm: Tensor
    """[C]"""
    mlp_norm: Tensor
    """[C]; applied after attention, before the MLP."""
    qkv: Tensor
    """[(H + 2K) D, C]"""
    output: Tensor
    """[C, H D]"""
    qkv_bias: Tensor | None = None
    output_bias: Tensor | None = None
    qk_norm: Tensor | None = None
    """[H + K, D]"""


@dataclass(frozen=True, slots=True)
class DenseWeights:
    gate_up: Tensor
    """[2I, C]"""
    down: Tensor
    """[C, I]"""


@dataclass(frozen=True, slots=True)
class MoEWeights:
    router: Tensor
    """[E, C]"""
    gate_up: Tensor
    """[E, 2I, C]"""
    down: Tensor
    """[E, C, I]"""


@dataclass(frozen=True, slots=True)
class ModelWeights:
    embedding: Tensor
    """[V, C]"""
    layers: tuple[tuple[AttentionWeights, DenseWeights | MoEWeights], ...]
    norm: Tensor
    """[C]"""
    output: Tensor
    """[V, C]; the embedding itself where they are tied."""


def assemble(config: ModelConfig, make: Callable[[Parameter], Tensor]) -> ModelWeights:
    """Weights of the model that `config` describes; `make` gives the tensor of a parameter."""

    def group(parameters: dict[str, Parameter]) -> dict[str, Tensor]:
        return {name: make(parameter) for name, parameter in parameters.items()}

    def layer(i: int) -> tuple[AttentionWeights, DenseWeights | MoEWeights]:
        mlp = group(mlp_parameters(config, i))
        return AttentionWeights(**group(attention_parameters(config, i))), (
            MoEWeights(**mlp) if "router" in mlp else DenseWeights(**mlp)
        )

    outside = group(model_parameters(config))
    layers = tuple(layer(i) for i in range(config.num_layers))
    return ModelWeights(outside["embedding"], layers, outside["norm"], outside.get("output", outside["embedding"]))


def load_weights(folder: str | Path, config: ModelConfig, dtype: torch.dtype, device: torch.device) -> ModelWeights:
    """Read a checkpoint's tensors, converted to `dtype` on `device`.

    Raises `CheckpointError` that names file and tensor where one is missing, unexpected, or has another shape than
    config.json says. All of that is checked before the first tensor is read.
    """
    checkpoint = Checkpoint.open(folder)
    check_tensors(checkpoint, config)
    with ExitStack() as stack:
        files: dict[Path, Any] = {}

        def read(name: str) -> Tensor:
            file = checkpoint.tensors[name].file
            try:
                if file not in files:
                    files[file] = stack.enter_context(safe_open(file, framework="pt", device="cpu"))
                tensor: Tensor = files[file].get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise CheckpointError(f"{file}: tensor {name} can't be read ({error}); copy the file again") from None
            return tensor

        def make(parameter: Parameter) -> Tensor:
            tensor = torch.empty(parameter.shape, dtype=dtype, device=device)
            flat, start = tensor.view(-1), 0
            for name, _ in parameter.parts:
                part = read(name)
                flat[start : start + part.numel()].copy_(part.flatten())
                start += part.numel()
            return tensor

        return assemble(config, make)


def check_tensors(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """`CheckpointError` where the files' tensors are not those of the model that config.json describes."""
    expected, found = checkpoint_tensors(config), checkpoint.tensors
    for name, shape in expected.items():
        if name not in found:
            raise CheckpointError(
                f"{checkpoint.folder}: tensor {name} {list(shape)} of {config.architecture} is missing; "
                "is a file missing, or config.json of another model?"
            )
        stored = found[name]
        if stored.shape != shape:
            raise CheckpointError(
                f"{stored.file}: tensor {name} has shape {list(stored.shape)}, config.json says {list(shape)}; "
                "one of the files is of another model"
            )
        if stored.dtype not in _DTYPES:
            raise CheckpointError(
                f"{stored.file}: tensor {name} is of type {stored.dtype}, must be one of {', '.join(_DTYPES)}"
            )
    for name in sorted(found.keys() - expected.keys()):
        if not (_UNUSED.fullmatch(name) or (name == "lm_head.weight" and config.tie_word_embeddings)):
            raise CheckpointError(
                f"{found[name].file}: tensor {name} {list(found[name].shape)} is no part of {config.architecture} "
                "as config.json describes it; is config.json of another model?"
            )
