"""What the description of a model family consists of. docs/adding-a-family.md shows how to write one.

All families are pre-norm decoders with rotary positions, root mean square norms, and gated MLPs, dense or mixtures of
experts. A description says which parts a family has, what they are called in a checkpoint, and what config.json means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.families.layer_rules import LayerTypes, all_full, every_layer
from engine.json_fields import Fields


@dataclass(frozen=True, slots=True)
class NormNames:
    """The norms of a layer, by their names in the checkpoint: before attention and MLP, and for some also after."""

    attention: str = "input_layernorm"
    after_attention: str | None = None
    mlp: str = "post_attention_layernorm"
    after_mlp: str | None = None


SANDWICH = NormNames(
    after_attention="post_attention_layernorm", mlp="pre_feedforward_layernorm", after_mlp="post_feedforward_layernorm"
)


@dataclass(frozen=True, slots=True)
class Routing:
    """How the gate's logits become the weights of the chosen experts."""

    scores: Literal["softmax", "sigmoid"] = "softmax"
    renormalize: bool | None = None
    """Whether the chosen weights are scaled to sum to 1; None: `norm_topk_prob` of config.json says."""
    group_score: Literal["best", "sum of best two"] | None = None
    """What a group of experts (`n_group`, `topk_group`) is chosen by; None: there are no groups."""
    bias: str | None = None
    """Name of a vector that is added to the scores for the choice, not for the weights."""


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """A mixture of experts: its names in the checkpoint and the keys of config.json that give its sizes."""

    router: str = "mlp.gate"
    router_bias: bool = False
    expert: str = "mlp.experts.{}"
    """Has a place for the number of the expert; where `stacked`, the prefix of the tensors that hold all of them."""
    stacked: bool = False
    """One tensor [E, in, out] for all experts, gate and up side by side, with biases (gpt-oss)."""
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    shared: str | None = None
    """An MLP that every token goes through besides its experts, `n_shared_experts` as wide as one of them."""
    num_experts_key: str = "num_experts"
    intermediate_size_key: str = "moe_intermediate_size"
    layers: Callable[[Fields, int], frozenset[int]] = every_layer
    """Which of so many layers have experts; the others have a dense MLP."""
    routing: Routing = Routing()


@dataclass(frozen=True, slots=True)
class Family:
    """`architecture` is the name that stands in `architectures` of config.json."""

    architecture: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What a key of config.json means where it is absent. A key that is null stays null."""
    only: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Keys of config.json for which nothing but these values is supported; absent or null is."""
    layer_types: LayerTypes = all_full
    """Which layers see only a window of `sliding_window` tokens. They may have a rotary base of their own."""
    attention_bias: Literal["config", "qkv", "none"] = "none"
    """Biases of Q, K, V and of the output: all or none by `attention_bias` of config.json; of Q, K, V always; never."""
    qk_norm: Literal["head", "full"] | None = None
    """Q and K are normalised: head by head, or over all heads together."""
    sinks: bool = False
    """Each query head has a logit that takes part in the softmax and carries no value."""
    latent: bool = False
    """Multi-head latent attention: K and V of all heads are made of one small vector a token, which is cached."""
    fused: bool = False
    """The checkpoint holds Q, K and V in one matrix (`qkv_proj`), and gate and up in another (`gate_up_proj`)."""
    norms: NormNames = NormNames()
    norm_offset: float = 0.0
    """Added to all norm weights."""
    scale_embedding: bool = False
    """Embeddings are multiplied by the square root of the hidden size."""
    activation: str | None = None
    """None: `hidden_act` of config.json, which must be SiLU."""
    experts: ExpertNames | None = None
