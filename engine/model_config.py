"""A model as the engine needs to know it, read from config.json and generation_config.json. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from core.errors import ConfigError
from core.model_info import ModelInfo, SamplingDefaults
from engine.checkpoint import Checkpoint
from engine.families import FAMILIES, ExpertNames, Family, WindowRule
from engine.json_fields import Fields, read_json

MAX_VOCAB_SIZE = 2**19
Dtype = Literal["float32", "bfloat16", "float16"]
_DTYPES: dict[str, Dtype] = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Base of the rotary frequencies and how they are stretched; `kind` says which of the other fields count."""

    theta: float
    kind: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True, slots=True)
class MoEConfig:
    """Mixture of experts in the given `layers`; the other layers have a dense MLP."""

    num_experts: int
    top_k: int
    intermediate_size: int
    norm_topk_prob: bool
    layers: frozenset[int]


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes and switches of one decoder. `architecture` is a key of `FAMILIES`."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    max_position: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: bool = False
    moe: MoEConfig | None = None
    dtype: Dtype = "float32"
    """What the checkpoint is stored in."""
    eos_token_ids: tuple[int, ...] = ()
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)

    @classmethod
    def from_folder(cls, path: str | Path) -> ModelConfig:
        """Read a Hugging Face checkpoint's description.

        Raises `CheckpointError` for what is missing, malformed, or not supported: nothing unknown is passed over that
        would change the model's output.
        """
        folder = Path(path)
        fields = Fields(folder / "config.json", read_json(folder / "config.json"))
        architecture, family = _family(fields)
        _refuse_unsupported(fields, family)
        num_heads, num_kv_heads, head_size = _heads(fields)
        num_layers = fields.integer("num_hidden_layers")
        attention_bias = fields.boolean("attention_bias")
        eos_token_ids, defaults = _generation(folder, fields)
        return cls(
            architecture=architecture,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=fields.integer("hidden_size"),
            intermediate_size=fields.integer("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            max_position=fields.integer("max_position_embeddings"),
            rms_norm_eps=fields.number("rms_norm_eps"),
            rope=_rope(fields, family),
            tie_word_embeddings=fields.boolean("tie_word_embeddings"),
            qkv_bias=attention_bias if family.attention_bias is None else family.attention_bias,
            output_bias=attention_bias and family.attention_bias is None,
            qk_norm=family.qk_norm,
            moe=None if family.experts is None else _moe(fields, family.experts, num_layers),
            dtype=_dtype(fields),
            eos_token_ids=eos_token_ids,
            defaults=defaults,
        )

    def max_model_len(self, limit: int | None) -> int:
        """Prompt and output together, in tokens; `ConfigError` where `limit` is more than the model can."""
        if limit is not None and limit > self.max_position:
            raise ConfigError("engine.max_model_len", limit, f"must be <= {self.max_position}, the model's own limit")
        return self.max_position if limit is None else limit


def model_info(path: str | Path, name: str, max_model_len: int | None = None) -> ModelInfo:
    """What the front door must know of the checkpoint in a folder, served under `name`."""
    config = ModelConfig.from_folder(path)
    return ModelInfo(
        name=name,
        architecture=config.architecture,
        fingerprint=Checkpoint.open(path).fingerprint(),
        vocab_size=config.vocab_size,
        max_model_len=config.max_model_len(max_model_len),
        eos_token_ids=config.eos_token_ids,
        defaults=config.defaults,
    )


def _family(fields: Fields) -> tuple[str, Family]:
    names = fields.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if name not in FAMILIES:
        raise fields.error("architectures", f"must name one of the supported: {', '.join(FAMILIES)}")
    return str(name), FAMILIES[str(name)]


def _heads(fields: Fields) -> tuple[int, int, int]:
    """Number of query heads, number of KV heads, head size."""
    num_heads = fields.integer("num_attention_heads")
    num_kv_heads = fields.integer("num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise fields.error("num_key_value_heads", f"must divide num_attention_heads ({num_heads})")
    head_size = fields.integer("head_dim", default=fields.integer("hidden_size") // num_heads)
    if head_size % 2:
        raise fields.error("head_dim", f"must be even for rotary positions, is {head_size}")
    return num_heads, num_kv_heads, head_size


def _refuse_unsupported(fields: Fields, family: Family) -> None:
    """`CheckpointError` for what the engine would have to do differently."""
    if fields.get("quantization_config") is not None:
        raise fields.error("quantization_config", "but quantized checkpoints are not supported; use the original one")
    if fields.get("hidden_act") not in (None, "silu"):
        raise fields.error("hidden_act", "must be 'silu'; other activations are not supported")
    if fields.integer("vocab_size") >= MAX_VOCAB_SIZE:
        raise fields.error("vocab_size", f"must be below {MAX_VOCAB_SIZE}, what the sampler can sum up")
    if fields.boolean("mlp_bias"):
        raise fields.error("mlp_bias", "but biases in the MLP are not supported")
    max_position = fields.integer("max_position_embeddings")
    if _has_window(fields, family.window) and fields.integer("sliding_window") < max_position:
        raise fields.error("sliding_window", f"but windows below the model's length ({max_position}) are not supported")


def _has_window(fields: Fields, rule: WindowRule) -> bool:
    """Whether the attention of any layer is windowed."""
    if rule is WindowRule.NEVER or fields.get("sliding_window") is None:
        return False
    if rule is WindowRule.WHEN_SET:
        return True
    if rule is WindowRule.WHEN_SWITCHED_ON or not fields.boolean("use_sliding_window"):
        return fields.boolean("use_sliding_window")
    layer_types = fields.get("layer_types")
    if isinstance(layer_types, list):
        return any(kind != "full_attention" for kind in layer_types)
    return fields.integer("max_window_layers", default=28, minimum=0) < fields.integer("num_hidden_layers")


def _rope(fields: Fields, family: Family) -> RopeConfig:
    """From `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling` (before)."""
    scaling = fields.group("rope_parameters") or fields.group("rope_scaling")
    theta_fields = scaling if scaling is not None and scaling.get("rope_theta") is not None else fields
    theta = theta_fields.number("rope_theta", default=family.rope_theta)
    if fields.get("partial_rotary_factor") not in (None, 1):
        raise fields.error("partial_rotary_factor", "but partial rotary embeddings are not supported")
    if scaling is None:
        return RopeConfig(theta)
    if scaling.get("partial_rotary_factor") not in (None, 1):
        raise scaling.error("partial_rotary_factor", "but partial rotary embeddings are not supported")
    key = "rope_type" if scaling.get("rope_type") is not None else "type"
    match scaling.get(key):
        case "default":
            return RopeConfig(theta)
        case "linear":
            return RopeConfig(theta, "linear", factor=scaling.number("factor"))
        case "llama3":
            return RopeConfig(
                theta,
                "llama3",
                factor=scaling.number("factor"),
                low_freq_factor=scaling.number("low_freq_factor"),
                high_freq_factor=scaling.number("high_freq_factor"),
                original_max_position=scaling.integer("original_max_position_embeddings"),
            )
    raise scaling.error(key, "must be 'default', 'linear' or 'llama3'; other rotary scalings are not supported")


def _moe(fields: Fields, names: ExpertNames, num_layers: int) -> MoEConfig:
    key = "num_local_experts" if fields.get("num_local_experts") is not None else "num_experts"
    num_experts, top_k = fields.integer(key), fields.integer("num_experts_per_tok")
    if top_k > num_experts:
        raise fields.error("num_experts_per_tok", f"must be <= {key} ({num_experts})")
    step, dense = fields.integer("decoder_sparse_step", default=1), fields.integers("mlp_only_layers")
    return MoEConfig(
        num_experts=num_experts,
        top_k=top_k,
        intermediate_size=fields.integer(names.intermediate_size_key),
        norm_topk_prob=fields.boolean("norm_topk_prob") if names.norm_topk_prob is None else names.norm_topk_prob,
        layers=frozenset(i for i in range(num_layers) if (i + 1) % step == 0 and i not in dense),
    )


def _dtype(fields: Fields) -> Dtype:
    key = "dtype" if fields.get("dtype") is not None else "torch_dtype"
    name = str(fields.get(key) or "float32").removeprefix("torch.")
    if name not in _DTYPES:
        raise fields.error(key, f"must be one of {', '.join(_DTYPES)}")
    return _DTYPES[name]


def _generation(folder: Path, config: Fields) -> tuple[tuple[int, ...], SamplingDefaults]:
    """End-of-sequence tokens and sampling defaults: generation_config.json where there is one, then config.json."""
    path = folder / "generation_config.json"
    if not path.exists():
        return config.integers("eos_token_id"), SamplingDefaults()
    fields = Fields(path, read_json(path))
    temperature = fields.get("temperature")
    defaults = SamplingDefaults(
        temperature=0.0 if temperature == 0 else _optional_number(fields, "temperature"),
        top_p=_optional_number(fields, "top_p"),
        top_k=None if fields.get("top_k") is None else fields.integer("top_k", minimum=0),
    )
    if defaults.top_p is not None and defaults.top_p > 1:
        raise fields.error("top_p", "must be in (0, 1]")
    return fields.integers("eos_token_id") or config.integers("eos_token_id"), defaults


def _optional_number(fields: Fields, name: str) -> float | None:
    return None if fields.get(name) is None else fields.number(name)
