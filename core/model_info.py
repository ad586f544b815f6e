"""What the front door must know of the served model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """From the checkpoint's generation_config.json; None where it says nothing."""

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """`max_model_len` counts prompt and output together. `fingerprint` is of config and weights."""

    name: str
    architecture: str
    fingerprint: str
    vocab_size: int
    max_model_len: int
    eos_token_ids: tuple[int, ...]
    defaults: SamplingDefaults = SamplingDefaults()
