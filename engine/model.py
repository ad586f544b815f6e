"""The decoder: one forward pass over the tokens of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.attention import make_attention
from engine.model_config import ModelConfig, MoEConfig
from engine.rotary import inverse_frequencies
from engine.step_inputs import StepInputs
from engine.weights import MLPWeights, ModelWeights, MoEWeights, Storage
from kernels.moe import route
from kernels.paged_kv import LayerKV
from kernels.rms_norm import rms_norm
from kernels.rope import rope_angles


class Model:
    """Shapes: T tokens of a step, C hidden size. `max_model_len` is what some rotary scalings choose by."""

    def __init__(self, config: ModelConfig, weights: ModelWeights, storage: Storage, max_model_len: int) -> None:
        self.config = config
        self._weights, self._dtype = weights, storage.dtype
        self._attention = [
            make_attention(config, layer, layer_weights.attention)
            for layer, layer_weights in zip(config.layers, weights.layers, strict=True)
        ]
        ropes = list(dict.fromkeys(layer.rope for layer in config.layers))
        self._rope_of_layer = [ropes.index(layer.rope) for layer in config.layers]
        self._ropes = [
            (inverse_frequencies(rope, max_model_len).to(storage.device), rope.attention_factor) for rope in ropes
        ]

    def forward(self, inputs: StepInputs, kv_layers: Sequence[LayerKV], on_layer: Callable[[int], None]) -> Tensor:
        """Hidden states [T, C] of the step's tokens; what they cache goes into `kv_layers` (see `KVStorage.layers`).

        `on_layer(l)` is called once that of layer l is written, before the layer's attention.
        """
        eps = self.config.rms_norm_eps
        angles = [self._angles(inputs.positions, *rope) for rope in self._ropes]
        hidden = self._embed(inputs.token_ids)
        for index, (weights, kv) in enumerate(zip(self._weights.layers, kv_layers, strict=True)):
            attention = self._attention[index]
            normed = rms_norm(hidden, weights.attention_norm, eps)
            q = attention.project(normed, inputs, kv, *angles[self._rope_of_layer[index]])
            on_layer(index)
            if weights.after_attention_norm is None:
                hidden = attention.attend(q, kv, inputs.spans, hidden)
            else:
                hidden = hidden + rms_norm(
                    attention.attend(q, kv, inputs.spans, None), weights.after_attention_norm, eps
                )
            normed = rms_norm(hidden, weights.mlp_norm, eps)
            if weights.after_mlp_norm is None:
                hidden = self._mlp(normed, weights.mlp, hidden)
            else:
                hidden = hidden + rms_norm(self._mlp(normed, weights.mlp, None), weights.after_mlp_norm, eps)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [S, C], the rows that draw a token; returns [S, V] float32."""
        normed = rms_norm(hidden, self._weights.norm, self.config.rms_norm_eps)
        logits = self._weights.output(normed).to(torch.float32)
        cap = self.config.final_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _embed(self, token_ids: Tensor) -> Tensor:
        rows = self._weights.embedding.index_select(0, token_ids).to(self._dtype)
        return rows if self.config.embedding_scale == 1.0 else rows * self.config.embedding_scale

    def _angles(self, positions: Tensor, frequencies: Tensor, factor: float) -> tuple[Tensor, Tensor]:
        cos, sin = rope_angles(positions, frequencies)
        return (cos, sin) if factor == 1.0 else (cos * factor, sin * factor)

    def _mlp(self, x: Tensor, weights: MLPWeights | MoEWeights, residual: Tensor | None) -> Tensor:
        """x, residual: [T, C]; returns [T, C]."""
        if isinstance(weights, MLPWeights):
            return weights.down(weights.gate_up(x), residual)
        assert self.config.moe is not None, "expert weights of a model without experts"
        gates, expert_ids = self._route(x, weights, self.config.moe)
        if weights.shared is not None:
            residual = self._mlp(x, weights.shared, residual)
        return weights.experts(x, gates, expert_ids, residual)

    def _route(self, x: Tensor, weights: MoEWeights, moe: MoEConfig) -> tuple[Tensor, Tensor]:
        names = self.config.family.experts
        assert names is not None, "expert weights of a family without experts"
        return route(
            weights.router(x.to(torch.float32)),
            moe.top_k,
            moe.renormalize,
            scores=names.routing.scores,
            bias=weights.score_bias,
            num_groups=moe.num_groups,
            top_groups=moe.top_groups,
            group_best=2 if names.routing.group_score == "sum of best two" else 1,
            scale=moe.scale,
        )
