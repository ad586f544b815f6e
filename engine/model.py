"""The decoder: one forward pass over the tokens of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from engine.attention import make_attention
from engine.gating import gating
from engine.model_config import ModelConfig
from engine.native_layers import native_layers
from engine.rotary import inverse_frequencies
from engine.step_inputs import StepInputs
from engine.weights import MLPWeights, ModelWeights, MoEWeights, Storage
from kernels.layers import NativeLayers
from kernels.moe import route
from kernels.paged_kv import LayerKV, PickedRows
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
        self._ropes = [
            (inverse_frequencies(rope, max_model_len).to(storage.device), rope.attention_factor)
            for rope in config.ropes
        ]
        self._rope_of_layer = [config.ropes.index(layer.rope) for layer in config.layers]
        self._gating = gating(config)
        self._fast: tuple[Sequence[LayerKV], NativeLayers | None] | None = None

    def forward(
        self,
        inputs: StepInputs,
        kv_layers: Sequence[LayerKV],
        on_layer: Callable[[int], None] | None = None,
        picked: PickedRows | None = None,
    ) -> Tensor:
        """Hidden states [T, C] of the step's tokens, or [S, C] of those picked; what all of them cache goes into
        `kv_layers` (see `KVStorage.layers`).

        `on_layer(l)` is called once that of layer l is written, before the layer's attention.
        """
        angles = [rope_angles(inputs.positions, *rope) for rope in self._ropes]
        hidden = self._embed(inputs.token_ids)
        native = self._native(kv_layers)
        if native is not None:
            return native(hidden, inputs.slots, inputs.spans, angles, on_layer, picked)
        for index, kv in enumerate(kv_layers):
            wanted = picked if index == len(kv_layers) - 1 else None
            hidden = self._layer(index, hidden, inputs, kv, angles[self._rope_of_layer[index]], on_layer, wanted)
        return hidden

    def _native(self, kv_layers: Sequence[LayerKV]) -> NativeLayers | None:
        if self._fast is None or self._fast[0] is not kv_layers:
            self._fast = kv_layers, native_layers(self.config, self._weights, kv_layers)
        return self._fast[1]

    def _layer(
        self,
        index: int,
        hidden: Tensor,
        inputs: StepInputs,
        kv: LayerKV,
        angles: tuple[Tensor, Tensor],
        on_layer: Callable[[int], None] | None,
        picked: PickedRows | None,
    ) -> Tensor:
        """One operation after the other."""
        eps, weights, attention = self.config.rms_norm_eps, self._weights.layers[index], self._attention[index]
        q = attention.project(rms_norm(hidden, weights.attention_norm, eps), inputs, kv, *angles)
        if on_layer is not None:
            on_layer(index)
        spans = inputs.spans
        if picked is not None:
            q, hidden, spans = q.index_select(0, picked.rows), hidden.index_select(0, picked.rows), picked.spans
            if not len(hidden):
                return hidden
        if weights.after_attention_norm is None:
            hidden = attention.attend(q, kv, spans, hidden)
        else:
            hidden = hidden + rms_norm(attention.attend(q, kv, spans, None), weights.after_attention_norm, eps)
        normed = rms_norm(hidden, weights.mlp_norm, eps)
        if weights.after_mlp_norm is None:
            return self._mlp(normed, weights.mlp, hidden)
        return hidden + rms_norm(self._mlp(normed, weights.mlp, None), weights.after_mlp_norm, eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden: [S, C], the rows that draw a token; returns [S, V] float32."""
        normed = rms_norm(hidden, self._weights.norm, self.config.rms_norm_eps)
        logits = self._weights.output(normed).to(torch.float32)
        cap = self.config.final_softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def _embed(self, token_ids: Tensor) -> Tensor:
        rows = self._weights.embedding.index_select(0, token_ids).to(self._dtype)
        return rows if self.config.embedding_scale == 1.0 else rows * self.config.embedding_scale

    def _mlp(self, x: Tensor, weights: MLPWeights | MoEWeights, residual: Tensor | None) -> Tensor:
        """x, residual: [T, C]; returns [T, C]."""
        if isinstance(weights, MLPWeights):
            return weights.down(weights.gate_up(x), residual)
        gates, expert_ids = self._route(x, weights)
        if weights.shared is not None:
            residual = self._mlp(x, weights.shared, residual)
        return weights.experts(x, gates, expert_ids, residual)

    def _route(self, x: Tensor, weights: MoEWeights) -> tuple[Tensor, Tensor]:
        assert self._gating is not None, "expert weights of a model without experts"
        return route(weights.router(x.to(torch.float32)), self._gating, weights.score_bias)
