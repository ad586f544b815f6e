"""The attention of one layer: what it puts into the cache, and what it reads there.

T tokens of a step, C hidden size, H query heads, K KV heads, D head size.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from engine.model_config import LatentConfig, LayerConfig, ModelConfig
from engine.step_inputs import StepInputs
from engine.weights import HeadsWeights, LatentWeights
from kernels.kv_write import write_latent_
from kernels.mla import mla_attention
from kernels.paged_attention import PagedAttention
from kernels.paged_kv import LayerKV, PagedKV, PagedLatent, Spans
from kernels.qkv import QKVWrite
from kernels.rms_norm import rms_norm
from kernels.rope import apply_rope

LATENT_NORM_EPS = 1e-6
"""DeepSeek's models have this inside of attention, whatever config.json says of the other norms."""


class Attention(Protocol):
    def project(self, x: Tensor, inputs: StepInputs, kv: LayerKV, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [T, C], normalised; cos, sin: [T, P/2]; writes what the layer caches of the tokens, returns their Q."""

    def attend(self, q: Tensor, kv: LayerKV, spans: Spans, residual: Tensor | None) -> Tensor:
        """q: from `project`; residual: [T, C], added where there is one; returns [T, C]."""


def make_attention(config: ModelConfig, layer: LayerConfig, weights: HeadsWeights | LatentWeights) -> Attention:
    if isinstance(weights, HeadsWeights):
        return HeadsAttention(config, layer, weights)
    assert config.latent is not None, "weights of latent attention for a model without"
    return LatentAttention(config, config.latent, weights)


class HeadsAttention:
    """Heads with K and V of their own, or shared by a group of them."""

    def __init__(self, config: ModelConfig, layer: LayerConfig, weights: HeadsWeights) -> None:
        self._weights = weights
        self._write = QKVWrite(
            weights.q_norm, weights.k_norm, config.rms_norm_eps, config.num_heads, config.num_kv_heads
        )
        self._attend = PagedAttention(config.attention_scale, layer.window, config.attention_softcap, weights.sinks)

    def project(self, x: Tensor, inputs: StepInputs, kv: LayerKV, cos: Tensor, sin: Tensor) -> Tensor:
        assert isinstance(kv, PagedKV), "a latent cache for attention over heads"
        return self._write(self._weights.qkv(x), kv, inputs.slots, cos, sin)

    def attend(self, q: Tensor, kv: LayerKV, spans: Spans, residual: Tensor | None) -> Tensor:
        assert isinstance(kv, PagedKV), "a latent cache for attention over heads"
        return self._weights.output(self._attend(q, kv, spans), residual)


class LatentAttention:
    """Multi-head latent attention (DeepSeek-V2, 2024). R size of the latent vector, N, P and V of a head's parts.

    The matrices that make K and V of a latent vector are applied to Q and to the result instead: the cache is read as
    it is, as one KV head that all query heads share.
    """

    def __init__(self, config: ModelConfig, latent: LatentConfig, weights: LatentWeights) -> None:
        self._weights, self._latent = weights, latent
        self._num_heads, self._scale = config.num_heads, config.attention_scale

    def project(self, x: Tensor, inputs: StepInputs, kv: LayerKV, cos: Tensor, sin: Tensor) -> Tensor:
        """Returns [T, H, R + P]."""
        assert isinstance(kv, PagedLatent), "a cache of heads for latent attention"
        weights, latent = self._weights, self._latent
        compressed, k_rope = torch.split(weights.kv_down(x), [latent.kv_rank, latent.rope_size], dim=1)
        normed = rms_norm(compressed, weights.kv_down_norm, LATENT_NORM_EPS)
        turned = apply_rope(k_rope.unsqueeze(1), cos, sin).squeeze(1)
        write_latent_(kv, inputs.slots, torch.cat((normed, turned), dim=1))
        if weights.q_down is not None and weights.q_down_norm is not None:
            x = rms_norm(weights.q_down(x), weights.q_down_norm, LATENT_NORM_EPS)
        heads = weights.q(x).view(x.shape[0], self._num_heads, -1)
        plain, rotary = torch.split(heads, [latent.nope_size, latent.rope_size], dim=2)
        absorbed = [up(plain[:, h].contiguous()) for h, up in enumerate(weights.k_up)]
        return torch.cat((torch.stack(absorbed, dim=1), apply_rope(rotary, cos, sin)), dim=2)

    def attend(self, q: Tensor, kv: LayerKV, spans: Spans, residual: Tensor | None) -> Tensor:
        assert isinstance(kv, PagedLatent), "a cache of heads for latent attention"
        latents = mla_attention(q, kv, spans, scale=self._scale, rank=self._latent.kv_rank)
        by_head = latents.view(q.shape[0], self._num_heads, -1)
        values = [up(by_head[:, h].contiguous()) for h, up in enumerate(self._weights.v_up)]
        return self._weights.output(torch.cat(values, dim=1), residual)
