"""Which tensors a model consists of, and where they lie in a checkpoint: one description for all families. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass

from engine.families.family import ExpertNames
from engine.model_config import LatentConfig, ModelConfig, MoEConfig


@dataclass(frozen=True, slots=True)
class Source:
    """A tensor of the checkpoint, or rows of it."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor, as it is stored."""
    rows: slice | tuple[int, ...] | None = None
    """Of the matrix [N, K], after `expert` and `transposed`."""
    expert: int | None = None
    """Index into the first dimension."""
    transposed: bool = False
    is_matrix: bool = False
    """Of a linear layer: it may be stored as codes."""


@dataclass(frozen=True, slots=True)
class LinearSources:
    """Parts of a weight, stacked along their rows, and of its bias; no bias where there are none."""

    weights: tuple[Source, ...]
    biases: tuple[Source, ...] = ()


@dataclass(frozen=True, slots=True)
class HeadsSources:
    qkv: LinearSources
    output: LinearSources
    q_norm: Source | None
    k_norm: Source | None
    sinks: Source | None


@dataclass(frozen=True, slots=True)
class LatentSources:
    """`q_down` and its norm are missing where Q comes from the hidden state."""

    q_down: LinearSources | None
    q_down_norm: Source | None
    q: LinearSources
    kv_down: LinearSources
    kv_down_norm: Source
    kv: Source
    output: LinearSources


@dataclass(frozen=True, slots=True)
class MLPSources:
    gate: LinearSources
    up: LinearSources
    down: LinearSources


@dataclass(frozen=True, slots=True)
class MoESources:
    router: LinearSources
    score_bias: Source | None
    experts: tuple[MLPSources, ...]
    shared: MLPSources | None


@dataclass(frozen=True, slots=True)
class LayerSources:
    attention_norm: Source
    after_attention_norm: Source | None
    mlp_norm: Source
    after_mlp_norm: Source | None
    attention: HeadsSources | LatentSources
    mlp: MLPSources | MoESources


@dataclass(frozen=True, slots=True)
class ModelSources:
    """A tied output matrix has no source of its own."""

    embedding: Source
    norm: Source
    output: LinearSources | None


def model_sources(config: ModelConfig) -> ModelSources:
    """What stands outside of the layers."""
    shape = (config.vocab_size, config.hidden_size)
    return ModelSources(
        embedding=Source("model.embed_tokens.weight", shape),
        norm=Source("model.norm.weight", (config.hidden_size,)),
        output=None if config.tie_word_embeddings else _linear("lm_head", shape),
    )


def layer_sources(config: ModelConfig, layer: int) -> LayerSources:
    prefix, names = f"model.layers.{layer}", config.family.norms

    def norm(name: str) -> Source:
        return Source(f"{prefix}.{name}.weight", (config.hidden_size,))

    attention = f"{prefix}.self_attn"
    return LayerSources(
        attention_norm=norm(names.attention),
        after_attention_norm=None if names.after_attention is None else norm(names.after_attention),
        mlp_norm=norm(names.mlp),
        after_mlp_norm=None if names.after_mlp is None else norm(names.after_mlp),
        attention=_heads(config, attention) if config.latent is None else _latent(config, config.latent, attention),
        mlp=_mlp(config, prefix, layer),
    )


def all_sources(config: ModelConfig) -> Iterator[Source]:
    """Every tensor that the checkpoint must hold; one that is used in parts comes several times."""
    yield from _walk(model_sources(config))
    for layer in range(config.num_layers):
        yield from _walk(layer_sources(config, layer))


def _walk(value: object) -> Iterator[Source]:
    if isinstance(value, Source):
        yield value
    elif isinstance(value, tuple):
        for each in value:
            yield from _walk(each)
    elif is_dataclass(value):
        for f in fields(value):
            yield from _walk(getattr(value, f.name))


def _heads(config: ModelConfig, prefix: str) -> HeadsSources:
    family, hidden = config.family, config.hidden_size
    sizes = [n * config.head_size for n in (config.num_heads, config.num_kv_heads, config.num_kv_heads)]
    if family.fused:
        qkv = _linear(f"{prefix}.qkv_proj", (sum(sizes), hidden), config.qkv_bias)
    else:
        parts = [_linear(f"{prefix}.{n}_proj", (s, hidden), config.qkv_bias) for n, s in zip("qkv", sizes, strict=True)]
        qkv = LinearSources(tuple(w for p in parts for w in p.weights), tuple(b for p in parts for b in p.biases))
    norms: list[Source | None] = [None, None]
    if family.qk_norm is not None:
        widths = [config.head_size] * 2 if family.qk_norm == "head" else sizes[:2]
        norms = [Source(f"{prefix}.{n}_norm.weight", (width,)) for n, width in zip("qk", widths, strict=True)]
    return HeadsSources(
        qkv=qkv,
        output=_linear(f"{prefix}.o_proj", (hidden, sizes[0]), config.output_bias),
        q_norm=norms[0],
        k_norm=norms[1],
        sinks=Source(f"{prefix}.sinks", (config.num_heads,)) if family.sinks else None,
    )


def _latent(config: ModelConfig, latent: LatentConfig, prefix: str) -> LatentSources:
    """Rows of rotary elements are brought from pairs into halves, which is how the engine turns them."""
    hidden, heads = config.hidden_size, config.num_heads
    turn = _halves(latent.rope_size) if latent.interleaved else range(latent.rope_size)
    q_rows = [h * config.head_size + i for h in range(heads) for i in (*range(latent.nope_size), *_after(latent, turn))]
    kv_rows = (*range(latent.kv_rank), *(latent.kv_rank + i for i in turn))
    kv_down = (latent.kv_rank + latent.rope_size, hidden)
    q_down, q_name, q_columns = None, "q_proj", hidden
    if latent.q_rank is not None:
        q_down = _linear(f"{prefix}.q_a_proj", (latent.q_rank, hidden), config.qkv_bias)
        q_name, q_columns = "q_b_proj", latent.q_rank
    return LatentSources(
        q_down=q_down,
        q_down_norm=None if latent.q_rank is None else Source(f"{prefix}.q_a_layernorm.weight", (latent.q_rank,)),
        q=_linear(f"{prefix}.{q_name}", (heads * config.head_size, q_columns), rows=tuple(q_rows)),
        kv_down=_linear(f"{prefix}.kv_a_proj_with_mqa", kv_down, config.qkv_bias, rows=kv_rows),
        kv_down_norm=Source(f"{prefix}.kv_a_layernorm.weight", (latent.kv_rank,)),
        kv=_matrix(f"{prefix}.kv_b_proj.weight", (heads * (latent.nope_size + latent.v_size), latent.kv_rank)),
        output=_linear(f"{prefix}.o_proj", (hidden, heads * latent.v_size), config.output_bias),
    )


def _halves(size: int) -> Sequence[int]:
    return (*range(0, size, 2), *range(1, size, 2))


def _after(latent: LatentConfig, turn: Sequence[int]) -> Iterator[int]:
    return (latent.nope_size + i for i in turn)


def _mlp(config: ModelConfig, prefix: str, layer: int) -> MLPSources | MoESources:
    names, moe = config.family.experts, config.moe
    if not config.layers[layer].has_experts or names is None or moe is None:
        return _dense(config, f"{prefix}.mlp", config.intermediate_size)
    return MoESources(
        router=_linear(f"{prefix}.{names.router}", (moe.num_experts, config.hidden_size), names.router_bias),
        score_bias=None if names.routing.bias is None else Source(f"{prefix}.{names.routing.bias}", (moe.num_experts,)),
        experts=tuple(_expert(config, moe, names, prefix, e) for e in range(moe.num_experts)),
        shared=None if names.shared is None else _dense(config, f"{prefix}.{names.shared}", moe.shared_size),
    )


def _dense(config: ModelConfig, prefix: str, size: int) -> MLPSources:
    hidden = config.hidden_size
    down = _linear(f"{prefix}.down_proj", (hidden, size))
    if not config.family.fused:
        gate, up = (_linear(f"{prefix}.{n}_proj", (size, hidden)) for n in ("gate", "up"))
        return MLPSources(gate, up, down)
    name, shape = f"{prefix}.gate_up_proj", (2 * size, hidden)
    return MLPSources(_linear(name, shape, rows=slice(0, size)), _linear(name, shape, rows=slice(size, None)), down)


def _expert(config: ModelConfig, moe: MoEConfig, names: ExpertNames, prefix: str, expert: int) -> MLPSources:
    hidden, size = config.hidden_size, moe.intermediate_size
    at = f"{prefix}.{names.expert.format(expert)}"
    if not names.stacked:
        gate, up = (_linear(f"{at}.{n}", (size, hidden)) for n in (names.gate, names.up))
        return MLPSources(gate, up, _linear(f"{at}.{names.down}", (hidden, size)))

    def stacked(name: str, num_rows: int, num_columns: int, rows: slice | None) -> LinearSources:
        weight = (moe.num_experts, num_columns, num_rows)
        return LinearSources(
            (Source(f"{at}.{name}", weight, rows, expert, transposed=True, is_matrix=True),),
            (Source(f"{at}.{name}_bias", (moe.num_experts, num_rows), rows, expert),),
        )

    gate, up = (stacked("gate_up_proj", 2 * size, hidden, slice(i, None, 2)) for i in (0, 1))
    return MLPSources(gate, up, stacked("down_proj", hidden, size, None))


def _linear(
    module: str, shape: tuple[int, int], has_bias: bool = False, rows: slice | tuple[int, ...] | None = None
) -> LinearSources:
    biases = (Source(f"{module}.bias", shape[:1], rows),) if has_bias else ()
    return LinearSources((_matrix(f"{module}.weight", shape, rows),), biases)


def _matrix(name: str, shape: tuple[int, int], rows: slice | tuple[int, ...] | None = None) -> Source:
    return Source(name, shape, rows, is_matrix=True)
