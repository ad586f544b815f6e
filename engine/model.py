"""The decoder: one forward pass over the tokens of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from engine.model_config import ModelConfig
from engine.rotary import inverse_frequencies
from engine.step_inputs import StepInputs
from engine.weights import AttentionWeights, DenseWeights, ModelWeights, MoEWeights
from kernels.moe import moe_experts, route
from kernels.paged_attention import paged_attention
from kernels.paged_kv import LayerKV, PagedKV
from kernels.qkv import qkv_rope_write_
from kernels.rms_norm import rms_norm
from kernels.rope import rope_angles
from kernels.swiglu import swiglu


class Model:
    """Shapes: T tokens of a step, C hidden size, H query heads, K KV heads, D head size."""

    def __init__(self, config: ModelConfig, weights: ModelWeights) -> None:
        self.config = config
        self._weights = weights
        self._inverse_frequencies = inverse_frequencies(config.rope, config.head_size).to(weights.embedding.device)

    def forward(self, inputs: StepInputs, kv_layers: Sequence[LayerKV], on_layer: Callable[[int], None]) -> Tensor:
        """Hidden states [T, C] of the step's tokens; their K and V go into `kv_layers` (see `KVStorage.layers`).

        `on_layer(l)` is called once K and V of layer l are written, before the layer's attention.
        """
        cos, sin = rope_angles(inputs.positions, self._inverse_frequencies)
        hidden = self._weights.embedding.index_select(0, inputs.token_ids)
        for layer, ((attention, mlp), kv_cache) in enumerate(zip(self._weights.layers, kv_layers, strict=True)):
            assert isinstance(kv_cache, PagedKV), "a latent cache for attention over heads"
            q = self._project(hidden, attention, kv_cache, inputs.slots, cos, sin)
            on_layer(layer)
            attended = paged_attention(q, kv_cache, inputs.spans, scale=self.config.head_size**-0.5)
            hidden = hidden + F.linear(attended, attention.output, attention.output_bias)
            hidden = hidden + self._mlp(rms_norm(hidden, attention.mlp_norm, self.config.rms_norm_eps), mlp)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [S, C], the rows that draw a token; returns [S, V] float32."""
        normed = rms_norm(hidden, self._weights.norm, self.config.rms_norm_eps)
        return F.linear(normed, self._weights.output).to(torch.float32)

    def _project(
        self, hidden: Tensor, weights: AttentionWeights, kv: PagedKV, slots: Tensor, cos: Tensor, sin: Tensor
    ) -> Tensor:
        """hidden: [T, C]; cos, sin: [T, D/2]; returns q [T, H, D], and writes k and v."""
        config, norms = self.config, weights.qk_norm
        normed = rms_norm(hidden, weights.input_norm, config.rms_norm_eps)
        return qkv_rope_write_(
            F.linear(normed, weights.qkv, weights.qkv_bias),
            kv,
            slots,
            cos,
            sin,
            None if norms is None else norms[0],
            None if norms is None else norms[-1],
            config.rms_norm_eps,
            config.num_heads,
            config.num_kv_heads,
        )

    def _mlp(self, x: Tensor, weights: DenseWeights | MoEWeights) -> Tensor:
        """x: [T, C]; returns [T, C]."""
        if isinstance(weights, DenseWeights):
            return F.linear(swiglu(F.linear(x, weights.gate_up)), weights.down)
        moe = self.config.moe
        assert moe is not None, "expert weights of a model without experts"
        gates, expert_ids = route(F.linear(x, weights.router), moe.top_k, moe.norm_topk_prob)
        return moe_experts(x, weights.gate_up, weights.down, gates, expert_ids)
