"""Whether a checkpoint's files hold the tensors of the model that config.json describes. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator

from core.errors import CheckpointError
from engine.checkpoint import Checkpoint
from engine.model_config import ModelConfig
from engine.parameters import Source, all_sources
from engine.quantization import Scheme, Stored

_FLOATS = ("F32", "BF16", "F16")
_LAYER = re.compile(r"model\.layers\.(\d+)\.(.*)")
_COMPUTED = "self_attn.rotary_emb.inv_freq"


def stored_scheme(checkpoint: Checkpoint, config: ModelConfig, source: Source) -> Scheme | None:
    """How the weight is stored as codes, or None where it is floats."""
    stored = checkpoint.tensors.get(source.name)
    if not source.is_matrix or config.quantization is None or (stored is not None and stored.dtype in _FLOATS):
        return None
    return config.quantization.scheme(source.name.removesuffix(".weight"))


def check_tensors(checkpoint: Checkpoint, config: ModelConfig) -> None:
    """`CheckpointError` where a tensor is missing, has another shape or type, or is no part of the model."""
    expected = _expected(checkpoint, config)
    for name, (shape, dtypes) in expected.items():
        _check(checkpoint, config, name, shape, dtypes)
    biases = set(superfluous_biases(checkpoint, config))
    for name in sorted(checkpoint.tensors.keys() - expected.keys() - biases):
        if not _is_unused(name, config):
            stored = checkpoint.tensors[name]
            raise CheckpointError(
                f"{stored.file}: tensor {name} {list(stored.shape)} is no part of {config.architecture} "
                "as config.json describes it; is config.json of another model?"
            )


def superfluous_biases(checkpoint: Checkpoint, config: ModelConfig) -> Iterator[str]:
    """Biases of GPTQ layers that have none: its tools wrote zeros there."""
    sources = {source.name: source for source in all_sources(config)}
    for name, source in sources.items():
        bias = name.removesuffix("weight") + "bias"
        if bias in checkpoint.tensors and bias not in sources:
            scheme = stored_scheme(checkpoint, config, source)
            if scheme is not None and scheme.method == "gptq":
                yield bias


def _expected(checkpoint: Checkpoint, config: ModelConfig) -> Stored:
    expected: Stored = {}
    for source in all_sources(config):
        scheme = stored_scheme(checkpoint, config, source)
        if scheme is None:
            expected[source.name] = (source.shape, _FLOATS)
        else:
            expected |= scheme.stored(source.name.removesuffix(".weight"), source.shape)
    return expected


def _check(
    checkpoint: Checkpoint, config: ModelConfig, name: str, shape: tuple[int, ...], dtypes: tuple[str, ...]
) -> None:
    if name not in checkpoint.tensors:
        raise CheckpointError(
            f"{checkpoint.folder}: tensor {name} {list(shape)} of {config.architecture} is missing; "
            "is a file missing, or config.json of another model?"
        )
    stored = checkpoint.tensors[name]
    if stored.shape != shape:
        raise CheckpointError(
            f"{stored.file}: tensor {name} has shape {list(stored.shape)}, config.json says {list(shape)}; "
            "one of the files is of another model"
        )
    if stored.dtype not in dtypes:
        raise CheckpointError(
            f"{stored.file}: tensor {name} is of type {stored.dtype}, must be one of {', '.join(dtypes)}"
        )


def _is_unused(name: str, config: ModelConfig) -> bool:
    if name == "lm_head.weight":
        return config.tie_word_embeddings
    layer = _LAYER.fullmatch(name)
    if layer is None:
        return False
    is_extra = config.num_layers <= int(layer[1]) < config.num_layers + config.num_extra_layers
    return is_extra or layer[2] == _COMPUTED
