"""Which models run their layers in one call of the C++ kernels, and what those are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from engine.gating import gating
from engine.model_config import LayerConfig, ModelConfig
from engine.weights import HeadsWeights, LayerWeights, MLPWeights, ModelWeights
from kernels.experts import NativeExperts
from kernels.layers import LayerParts, Mixture, NativeLayers
from kernels.native import function
from kernels.native_attention import KV_TYPES, NativeAttention
from kernels.native_linear import NativeLinear
from kernels.paged_kv import LayerKV, PagedKV
from kernels.qkv import NativeQKVWrite

_Kernel = Callable[[Any], Any]


def native_layers(config: ModelConfig, weights: ModelWeights, kv_layers: Sequence[LayerKV]) -> NativeLayers | None:
    """None where something of the model has no C++ kernel, or is computed in a way of its own: such a model runs one
    operation after the other, and comes to the same result."""
    write, attend = function("penstock_qkv_rope_write", "p"), function("penstock_attention", "p")
    if write is None or attend is None or weights.norm.dtype is not torch.float32:
        return None
    parts = []
    for layer, layer_weights, kv in zip(config.layers, weights.layers, kv_layers, strict=True):
        part = _parts(config, layer, layer_weights, kv, write, attend)
        if part is None:
            return None
        parts.append(part)
    return NativeLayers(parts, config.rms_norm_eps)


def _parts(
    config: ModelConfig, layer: LayerConfig, weights: LayerWeights, kv: LayerKV, write: _Kernel, attend: _Kernel
) -> LayerParts | None:
    heads, mlp = weights.attention, weights.mlp
    if not isinstance(heads, HeadsWeights) or not isinstance(kv, PagedKV):
        return None
    if kv.k.device.type != "cpu" or kv.k.dtype not in KV_TYPES:
        return None
    qkv, output = heads.qkv, heads.output
    if not isinstance(qkv, NativeLinear) or not isinstance(output, NativeLinear):
        return None
    dense = mlp if isinstance(mlp, MLPWeights) else mlp.shared
    gate_up, down = (None, None) if dense is None else (dense.gate_up, dense.down)
    if not isinstance(gate_up, NativeLinear | None) or not isinstance(down, NativeLinear | None):
        return None
    mixture = None
    if not isinstance(mlp, MLPWeights):
        rule = gating(config)
        if rule is None or not isinstance(mlp.router, NativeLinear) or not isinstance(mlp.experts, NativeExperts):
            return None
        mixture = Mixture(mlp.router, mlp.experts, mlp.score_bias, rule)
    return LayerParts(
        attention_norm=weights.attention_norm,
        after_attention_norm=weights.after_attention_norm,
        qkv=qkv,
        write=NativeQKVWrite(
            write, kv, heads.q_norm, heads.k_norm, config.rms_norm_eps, config.num_heads, config.num_kv_heads
        ),
        attention=NativeAttention(
            *(attend, kv, config.num_heads, config.attention_scale),
            *(layer.window, config.attention_softcap, heads.sinks),
        ),
        output=output,
        mlp_norm=weights.mlp_norm,
        after_mlp_norm=weights.after_mlp_norm,
        gate_up=gate_up,
        down=down,
        mixture=mixture,
        rope=config.ropes.index(layer.rope),
    )
