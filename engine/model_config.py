"""A model as the engine needs to know it, read from config.json and generation_config.json. Imports no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from core.errors import ConfigError
from core.model_info import ModelInfo, SamplingDefaults
from engine.checkpoint import Checkpoint
from engine.families import FAMILIES
from engine.families.family import ExpertNames, Family
from engine.json_fields import Fields, read_json
from engine.quantization import Quantization, read_quantization
from engine.rope_config import RopeConfig, read_rope, yarn_scale

MAX_VOCAB_SIZE = 2**19
Dtype = Literal["float32", "bfloat16", "float16"]
Activation = Literal["silu", "gelu_tanh", "swigluoai"]
_DTYPES: dict[str, Dtype] = {"float32": "float32", "bfloat16": "bfloat16", "float16": "float16"}
_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu_tanh": "gelu_tanh", "swigluoai": "swigluoai"}


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """What differs from layer to layer."""

    window: int | None
    """Tokens that a token sees, itself included; None: all before it."""
    rope: RopeConfig
    has_experts: bool


@dataclass(frozen=True, slots=True)
class LatentConfig:
    """Sizes of multi-head latent attention. A head's Q and K have a part without and a part with rotary positions."""

    q_rank: int | None
    """Size of the vector that Q of all heads is made of; None: Q comes from the hidden state."""
    kv_rank: int
    """Size of the vector that K and V of all heads are made of."""
    nope_size: int
    rope_size: int
    v_size: int
    interleaved: bool
    """Element 2i turns with 2i + 1 in the checkpoint's order."""


@dataclass(frozen=True, slots=True)
class MoEConfig:
    """Mixture of experts. Experts are chosen among the `top_groups` best of `num_groups` groups."""

    num_experts: int
    top_k: int
    intermediate_size: int
    renormalize: bool
    num_groups: int = 1
    top_groups: int = 1
    scale: float = 1.0
    """What the experts' weights are multiplied by."""
    shared_size: int = 0
    """Intermediate size of the MLP that every token goes through besides."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Sizes and switches of one decoder. `architecture` is a key of `FAMILIES`."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    """Of Q, K and V; with latent attention, of Q and K."""
    max_position: int
    rms_norm_eps: float
    layers: tuple[LayerConfig, ...]
    attention_scale: float
    """Of the logits q k."""
    activation: Activation = "silu"
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    embedding_scale: float = 1.0
    attention_softcap: float | None = None
    final_softcap: float | None = None
    latent: LatentConfig | None = None
    moe: MoEConfig | None = None
    dtype: Dtype = "float32"
    """What the checkpoint is stored in, or computes in where it is quantised."""
    quantization: Quantization | None = None
    num_extra_layers: int = 0
    """Layers in the checkpoint, after the last, that predict further tokens. They are not read."""
    eos_token_ids: tuple[int, ...] = ()
    defaults: SamplingDefaults = field(default_factory=SamplingDefaults)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def ropes(self) -> tuple[RopeConfig, ...]:
        """All that occur, each once."""
        return tuple(dict.fromkeys(layer.rope for layer in self.layers))

    @property
    def family(self) -> Family:
        return FAMILIES[self.architecture]

    @classmethod
    def from_folder(cls, path: str | Path) -> ModelConfig:
        """Read a Hugging Face checkpoint's description.

        Raises `CheckpointError` for what is missing, malformed, or not supported: nothing unknown is passed over that
        would change the model's output.
        """
        folder = Path(path)
        fields, family = _described(folder / "config.json")
        latent = _latent(fields) if family.latent else None
        num_heads, num_kv_heads, head_size = _heads(fields, latent)
        layers = _layers(fields, family, head_size if latent is None else latent.rope_size)
        attention_bias = family.attention_bias == "config" and fields.boolean("attention_bias")
        eos_token_ids, defaults = _generation(folder, fields)
        return cls(
            architecture=family.architecture,
            vocab_size=fields.integer("vocab_size"),
            hidden_size=fields.integer("hidden_size"),
            intermediate_size=fields.integer("intermediate_size"),
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            max_position=_max_position(fields, layers),
            rms_norm_eps=fields.number("rms_norm_eps"),
            layers=layers,
            attention_scale=_attention_scale(fields, head_size, latent is not None),
            activation=_ACTIVATIONS[family.activation or "silu"],
            tie_word_embeddings=fields.boolean("tie_word_embeddings"),
            qkv_bias=attention_bias or family.attention_bias == "qkv",
            output_bias=attention_bias,
            embedding_scale=math.sqrt(fields.integer("hidden_size")) if family.scale_embedding else 1.0,
            attention_softcap=_optional_number(fields, "attn_logit_softcapping"),
            final_softcap=_optional_number(fields, "final_logit_softcapping"),
            latent=latent,
            moe=None if family.experts is None else _moe(fields, family.experts),
            dtype=_dtype(fields),
            quantization=read_quantization(fields),
            num_extra_layers=fields.integer("num_nextn_predict_layers", default=0, minimum=0),
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


def _described(path: Path) -> tuple[Fields, Family]:
    """The fields of config.json, with the family's defaults where it says nothing."""
    values = read_json(path)
    family = _family(Fields(path, values))
    fields = Fields(path, {**family.defaults, **values})
    _refuse_unsupported(fields, family)
    return fields, family


def _family(fields: Fields) -> Family:
    names = fields.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    if name not in FAMILIES:
        raise fields.error("architectures", f"must name one of the supported: {', '.join(FAMILIES)}")
    return FAMILIES[str(name)]


def _refuse_unsupported(fields: Fields, family: Family) -> None:
    """`CheckpointError` for what the engine would have to do differently."""
    if family.activation is None and fields.get("hidden_act") not in (None, "silu"):
        raise fields.error("hidden_act", "must be 'silu'; other activations are not supported")
    if family.activation == "gelu_tanh":
        _only(fields, "hidden_activation", ("gelu_pytorch_tanh",))
    if fields.integer("vocab_size") >= MAX_VOCAB_SIZE:
        raise fields.error("vocab_size", f"must be below {MAX_VOCAB_SIZE}, what the sampler can sum up")
    for key, allowed in family.only.items():
        _only(fields, key, allowed)


def _only(fields: Fields, key: str, allowed: tuple[Any, ...]) -> None:
    if fields.get(key) is not None and fields.get(key) not in allowed:
        choices = " or ".join([*map(repr, allowed), "left out"])
        raise fields.error(key, f"must be {choices}; nothing else is supported for {fields.get('architectures')[0]}")


def _heads(fields: Fields, latent: LatentConfig | None) -> tuple[int, int, int]:
    """Number of query heads, number of KV heads, head size."""
    num_heads = fields.integer("num_attention_heads")
    num_kv_heads = fields.integer("num_key_value_heads", default=num_heads)
    if num_heads % num_kv_heads:
        raise fields.error("num_key_value_heads", f"must divide num_attention_heads ({num_heads})")
    if latent is not None:
        return num_heads, num_kv_heads, latent.nope_size + latent.rope_size
    head_size = fields.integer("head_dim", default=fields.integer("hidden_size") // num_heads)
    if head_size % 2:
        raise fields.error("head_dim", f"must be even for rotary positions, is {head_size}")
    return num_heads, num_kv_heads, head_size


def _latent(fields: Fields) -> LatentConfig:
    return LatentConfig(
        q_rank=None if fields.get("q_lora_rank") is None else fields.integer("q_lora_rank"),
        kv_rank=fields.integer("kv_lora_rank"),
        nope_size=fields.integer("qk_nope_head_dim"),
        rope_size=fields.integer("qk_rope_head_dim"),
        v_size=fields.integer("v_head_dim"),
        interleaved=fields.boolean("rope_interleave", default=True),
    )


def _layers(fields: Fields, family: Family, rotary_size: int) -> tuple[LayerConfig, ...]:
    """A window that no context of the model exceeds is none."""
    num_layers, max_position = fields.integer("num_hidden_layers"), fields.integer("max_position_embeddings")
    types = family.layer_types(fields, num_layers)
    window = fields.integer("sliding_window") if "sliding_attention" in types else max_position
    windows = {"full_attention": None, "sliding_attention": window if window < max_position else None}
    ropes = {kind: read_rope(fields, kind, rotary_size, max_position) for kind in set(types)}
    experts = frozenset() if family.experts is None else family.experts.layers(fields, num_layers)
    return tuple(LayerConfig(windows[kind], ropes[kind], i in experts) for i, kind in enumerate(types))


def _max_position(fields: Fields, layers: tuple[LayerConfig, ...]) -> int:
    """yarn's stretched context counts, which some checkpoints leave to the reader to work out."""
    stretched = (int(y.rope.original_max_position * y.rope.factor) for y in layers if y.rope.kind == "yarn")
    return max(fields.integer("max_position_embeddings"), *stretched, 0)


def _attention_scale(fields: Fields, head_size: int, latent: bool) -> float:
    """With latent attention, yarn's sharpening is no part of the rotation but of the scale (DeepSeek's model code)."""
    scale = 1 / math.sqrt(fields.number("query_pre_attn_scalar", default=head_size))
    scaling = fields.group("rope_parameters") or fields.group("rope_scaling")
    if latent and scaling is not None and scaling.get("mscale_all_dim"):
        scale *= yarn_scale(scaling.number("factor"), scaling.number("mscale_all_dim")) ** 2
    return scale


def _moe(fields: Fields, names: ExpertNames) -> MoEConfig:
    key = names.num_experts_key
    if fields.get(key) is None and fields.get("num_local_experts") is not None:
        key = "num_local_experts"
    num_experts, top_k = fields.integer(key), fields.integer("num_experts_per_tok")
    if top_k > num_experts:
        raise fields.error("num_experts_per_tok", f"must be <= {key} ({num_experts})")
    size, routing = fields.integer(names.intermediate_size_key), names.routing
    num_groups, top_groups = 1, 1
    if routing.group_score is not None and fields.get("topk_method") != "greedy" and fields.get("n_group") is not None:
        num_groups, top_groups = fields.integer("n_group"), fields.integer("topk_group")
        if num_experts % num_groups or not top_groups <= num_groups:
            raise fields.error("n_group", f"must divide {key} ({num_experts}) and be >= topk_group ({top_groups})")
        if top_k > num_experts // num_groups * top_groups:
            raise fields.error(
                "topk_group", f"must leave at least num_experts_per_tok ({top_k}) experts to choose from"
            )
    return MoEConfig(
        num_experts=num_experts,
        top_k=top_k,
        intermediate_size=size,
        renormalize=fields.boolean("norm_topk_prob") if routing.renormalize is None else routing.renormalize,
        num_groups=num_groups,
        top_groups=top_groups,
        scale=fields.number("routed_scaling_factor", default=1.0),
        shared_size=0 if names.shared is None else size * fields.integer("n_shared_experts", default=1),
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
        repetition_penalty=_optional_number(fields, "repetition_penalty"),
    )
    if defaults.top_p is not None and defaults.top_p > 1:
        raise fields.error("top_p", "must be in (0, 1]")
    return fields.integers("eos_token_id") or config.integers("eos_token_id"), defaults


def _optional_number(fields: Fields, name: str) -> float | None:
    return None if fields.get(name) is None else fields.number(name)
