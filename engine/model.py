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
from kernels.kv_write import write_kv_
from kernels.moe import moe_experts, route
from kernels.paged_attention import decode_attention, prefill_attention
from kernels.rms_norm import rms_norm
from kernels.rope import apply_rope, rope_angles
from kernels.swiglu import swiglu


class Model:
    """Shapes: T tokens of a step, C hidden size, H query heads, K KV heads, D head size."""

    def __init__(self, config: ModelConfig, weights: ModelWeights) -> None:
        self.config = config
        self._weights = weights
        self._inverse_frequencies = inverse_frequencies(config.rope, config.head_size).to(weights.embedding.device)

    def forward(self, inputs: StepInputs, kv_layers: Sequence[Tensor], on_layer: Callable[[int], None]) -> Tensor:
        """Hidden states [T, C] of the step's tokens; their K and V go into `kv_layers` (see `KVStorage.layers`).

        `on_layer(l)` is called once K and V of layer l are written, before the layer's attention.
        """
        cos, sin = rope_angles(inputs.positions, self._inverse_frequencies)
        hidden = self._weights.embedding.index_select(0, inputs.token_ids)
        for layer, ((attention, mlp), kv_cache) in enumerate(zip(self._weights.layers, kv_layers, strict=True)):
            q, k, v = self._project(hidden, attention, cos, sin)
            write_kv_(kv_cache, inputs.slots, k, v)
            on_layer(layer)
            attended = _attend(q, kv_cache, inputs)
            hidden = hidden + F.linear(attended, attention.output, attention.output_bias)
            hidden = hidden + self._mlp(rms_norm(hidden, attention.mlp_norm, self.config.rms_norm_eps), mlp)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [S, C], the rows that draw a token; returns [S, V] float32."""
        normed = rms_norm(hidden, self._weights.norm, self.config.rms_norm_eps)
        return F.linear(normed, self._weights.output).to(torch.float32)

    def _project(
        self, hidden: Tensor, weights: AttentionWeights, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """hidden: [T, C]; cos, sin: [T, 1, D]; returns q [T, H, D], k and v [T, K, D]."""
        config = self.config
        normed = rms_norm(hidden, weights.input_norm, config.rms_norm_eps)
        qkv = F.linear(normed, weights.qkv, weights.qkv_bias).view(hidden.shape[0], -1, config.head_size)
        qk, v = torch.split(qkv, [config.num_heads + config.num_kv_heads, config.num_kv_heads], dim=1)
        if weights.qk_norm is not None:
            qk = rms_norm(qk, weights.qk_norm, config.rms_norm_eps)
        q, k = torch.split(apply_rope(qk, cos, sin), [config.num_heads, config.num_kv_heads], dim=1)
        return q, k, v

    def _mlp(self, x: Tensor, weights: DenseWeights | MoEWeights) -> Tensor:
        """x: [T, C]; returns [T, C]."""
        if isinstance(weights, DenseWeights):
            return F.linear(swiglu(F.linear(x, weights.gate_up)), weights.down)
        moe = self.config.moe
        assert moe is not None, "expert weights of a model without experts"
        gates, expert_ids = route(F.linear(x, weights.router), moe.top_k, moe.norm_topk_prob)
        return moe_experts(x, weights.gate_up, weights.down, gates, expert_ids)


def _attend(q: Tensor, kv_cache: Tensor, inputs: StepInputs) -> Tensor:
    """q: [T, H, D]; returns [T, H D]."""
    outputs = [
        decode_attention(q[g.rows], kv_cache, g.block_tables, g.context_lens, g.max_context_len)
        for g in inputs.decode_groups
    ]
    outputs += [prefill_attention(q[s.rows], kv_cache, s.block_table, s.start) for s in inputs.prefill_spans]
    return (outputs[0] if len(outputs) == 1 else torch.cat(outputs)).flatten(1)
