"""Which tensors a model consists of: in memory, and in a checkpoint. The one description for all families. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from engine.families import FAMILIES
from engine.model_config import ModelConfig, MoEConfig

Part = tuple[str, tuple[int, ...]]
"""Name and shape of a tensor in the checkpoint."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A contiguous tensor of the given shape, filled by its parts one after the other."""

    shape: tuple[int, ...]
    parts: tuple[Part, ...]


def model_parameters(config: ModelConfig) -> dict[str, Parameter]:
    """What stands outside of the layers. A tied output matrix has no parameter of its own."""
    embedding = (config.vocab_size, config.hidden_size)
    parameters = {
        "embedding": _single("model.embed_tokens.weight", *embedding),
        "norm": _single("model.norm.weight", config.hidden_size),
    }
    if not config.tie_word_embeddings:
        parameters["output"] = _single("lm_head.weight", *embedding)
    return parameters


def attention_parameters(config: ModelConfig, layer: int) -> dict[str, Parameter]:
    """Norms and attention of one layer. Q, K and V are one matrix; so are the norms of all heads of Q and K."""
    prefix, hidden = f"model.layers.{layer}", config.hidden_size
    heads = {"q": config.num_heads, "k": config.num_kv_heads, "v": config.num_kv_heads}
    rows = {name: num_heads * config.head_size for name, num_heads in heads.items()}
    attention = f"{prefix}.self_attn"
    parameters = {
        "input_norm": _single(f"{prefix}.input_layernorm.weight", hidden),
        "mlp_norm": _single(f"{prefix}.post_attention_layernorm.weight", hidden),
        "qkv": _stacked([(f"{attention}.{n}_proj.weight", (size, hidden)) for n, size in rows.items()]),
        "output": _single(f"{attention}.o_proj.weight", hidden, rows["q"]),
    }
    if config.qkv_bias:
        parameters["qkv_bias"] = _stacked([(f"{attention}.{n}_proj.bias", (size,)) for n, size in rows.items()])
    if config.output_bias:
        parameters["output_bias"] = _single(f"{attention}.o_proj.bias", hidden)
    if config.qk_norm:
        norms = [(f"{attention}.{n}_norm.weight", (config.head_size,)) for n in "qk" for _ in range(heads[n])]
        parameters["qk_norm"] = Parameter((len(norms), config.head_size), tuple(norms))
    return parameters


def mlp_parameters(config: ModelConfig, layer: int) -> dict[str, Parameter]:
    """The MLP of one layer: dense, or with a router a mixture of experts."""
    prefix = f"model.layers.{layer}"
    if config.moe is not None and layer in config.moe.layers:
        return _moe_parameters(config, config.moe, prefix)
    hidden, size = config.hidden_size, config.intermediate_size
    return {
        "gate_up": _stacked([(f"{prefix}.mlp.{n}_proj.weight", (size, hidden)) for n in ("gate", "up")]),
        "down": _single(f"{prefix}.mlp.down_proj.weight", hidden, size),
    }


def _moe_parameters(config: ModelConfig, moe: MoEConfig, prefix: str) -> dict[str, Parameter]:
    names = FAMILIES[config.architecture].experts
    assert names is not None, f"{config.architecture} has no experts"
    hidden, size = config.hidden_size, moe.intermediate_size
    experts = [f"{prefix}.{names.expert.format(e)}" for e in range(moe.num_experts)]
    gate_up = [(f"{expert}.{name}.weight", (size, hidden)) for expert in experts for name in (names.gate, names.up)]
    down = [(f"{expert}.{names.down}.weight", (hidden, size)) for expert in experts]
    return {
        "router": _single(f"{prefix}.{names.router}.weight", moe.num_experts, hidden),
        "gate_up": Parameter((moe.num_experts, 2 * size, hidden), tuple(gate_up)),
        "down": Parameter((moe.num_experts, hidden, size), tuple(down)),
    }


def checkpoint_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the checkpoint must hold."""
    groups = [model_parameters(config)]
    for layer in range(config.num_layers):
        groups += [attention_parameters(config, layer), mlp_parameters(config, layer)]
    return {name: shape for group in groups for parameter in group.values() for name, shape in parameter.parts}


def _single(name: str, *shape: int) -> Parameter:
    return Parameter(shape, ((name, shape),))


def _stacked(parts: list[Part]) -> Parameter:
    """Parts that differ in their first dimension only."""
    return Parameter((sum(shape[0] for _, shape in parts), *parts[0][1][1:]), tuple(parts))
