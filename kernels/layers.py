"""All layers of a model in one call of the C++ kernels: see `csrc/layers.cpp`.

T tokens of a step, C hidden size.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.experts import NativeExperts
from kernels.moe import Gating
from kernels.native import native_function
from kernels.native_attention import NativeAttention, address
from kernels.native_linear import NativeLinear
from kernels.paged_kv import PickedRows, Spans
from kernels.qkv import NativeQKVWrite


@dataclass(frozen=True, slots=True)
class Mixture:
    """Experts and their gate."""

    router: NativeLinear
    experts: NativeExperts
    score_bias: Tensor | None
    """[E] float32, added to the scores for the choice only."""
    gating: Gating


@dataclass(frozen=True, slots=True)
class LayerParts:
    """What a layer is made of. Norms are [C] float32."""

    attention_norm: Tensor
    after_attention_norm: Tensor | None
    qkv: NativeLinear
    write: NativeQKVWrite
    attention: NativeAttention
    output: NativeLinear
    mlp_norm: Tensor
    after_mlp_norm: Tensor | None
    gate_up: NativeLinear | None
    down: NativeLinear | None
    mixture: Mixture | None
    """Its result is added to that of gate_up and down, where there are both."""
    rope: int
    """Which of the step's angles it turns by."""


class _Mixture(ctypes.Structure):
    _fields_ = (
        ("router", ctypes.c_void_p),
        ("gate_up", ctypes.c_void_p),
        ("down", ctypes.c_void_p),
        ("score_bias", ctypes.c_void_p),
        ("num_experts", ctypes.c_int32),
        ("top_k", ctypes.c_int32),
        ("renormalize", ctypes.c_int32),
        ("is_sigmoid", ctypes.c_int32),
        ("num_groups", ctypes.c_int32),
        ("top_groups", ctypes.c_int32),
        ("group_best", ctypes.c_int32),
        ("scale", ctypes.c_float),
    )


class _Layer(ctypes.Structure):
    _fields_ = (
        ("attention_norm", ctypes.c_void_p),
        ("after_attention_norm", ctypes.c_void_p),
        ("mlp_norm", ctypes.c_void_p),
        ("after_mlp_norm", ctypes.c_void_p),
        ("qkv", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("write", ctypes.c_void_p),
        ("attention", ctypes.c_void_p),
        ("gate_up", ctypes.c_void_p),
        ("down", ctypes.c_void_p),
        ("mixture", ctypes.c_void_p),
        ("rope", ctypes.c_int64),
    )


class _Layers(ctypes.Structure):
    _fields_ = (
        ("layers", ctypes.c_void_p),
        ("num_layers", ctypes.c_int64),
        ("hidden_size", ctypes.c_int64),
        ("eps", ctypes.c_float),
    )


class _Angles(ctypes.Structure):
    _fields_ = (("cos", ctypes.c_void_p), ("sin", ctypes.c_void_p), ("half", ctypes.c_int64))


class _Step(ctypes.Structure):
    _fields_ = (
        ("hidden", ctypes.c_void_p),
        ("num_tokens", ctypes.c_int64),
        ("slots", ctypes.c_void_p),
        ("spans", ctypes.c_void_p),
        ("blocks", ctypes.c_void_p),
        ("num_spans", ctypes.c_int64),
        ("angles", ctypes.c_void_p),
        ("picked", ctypes.c_void_p),
    )


class _Picked(ctypes.Structure):
    _fields_ = (
        ("rows", ctypes.c_void_p),
        ("num_rows", ctypes.c_int64),
        ("spans", ctypes.c_void_p),
        ("num_spans", ctypes.c_int64),
    )


class NativeLayers:
    """The layers of a model over one cache."""

    def __init__(self, parts: Sequence[LayerParts], eps: float) -> None:
        self._parts = tuple(parts)  # keeps what the pointers point to
        self._mixtures = [None if part.mixture is None else _mixture(part.mixture) for part in parts]
        self._layers = (_Layer * len(parts))(*map(_layer, parts, self._mixtures))
        hidden_size = parts[0].attention_norm.numel()
        self._struct = _Layers(ctypes.addressof(self._layers), len(parts), hidden_size, eps)
        self._run = native_function("penstock_run_layers", "ppqq")

    def __call__(
        self,
        hidden: Tensor,
        slots: Tensor,
        spans: Spans,
        angles: Sequence[tuple[Tensor, Tensor]],
        on_layer: Callable[[int], None] | None,
        picked: PickedRows | None,
    ) -> Tensor:
        """What the layers make of `hidden`, in its place: [T, C], or [S, C] where rows are picked.

        hidden: [T, C] float32; slots: [T] int64; angles: cosines and sines [T, P/2], a pair for each `LayerParts.rope`.

        `on_layer(l)` is called once K and V of layer l are in the cache, before the layer's attention.
        """
        angles = [(cos.contiguous(), sin.contiguous()) for cos, sin in angles]
        turns = (_Angles * len(angles))(*(_Angles(c.data_ptr(), s.data_ptr(), c.shape[1]) for c, s in angles))
        step = _Step(
            *(hidden.data_ptr(), hidden.shape[0], slots.data_ptr()),
            *(spans.table.data_ptr(), spans.blocks.data_ptr(), spans.table.shape[0]),
            ctypes.addressof(turns),
        )
        if picked is not None:
            table = picked.spans.table
            picks = _Picked(picked.rows.data_ptr(), len(picked.rows), table.data_ptr(), len(table))
            step.picked = ctypes.addressof(picks)
        layers, at, num_halves = ctypes.addressof(self._struct), ctypes.addressof(step), 2 * len(self._parts)
        done = 0
        if on_layer is not None:
            for index in range(len(self._parts)):
                self._run(layers, at, done, 2 * index + 1)
                done = 2 * index + 1
                on_layer(index)
        self._run(layers, at, done, num_halves)
        return hidden if picked is None else hidden[: len(picked.rows)]


def _layer(part: LayerParts, mixture: _Mixture | None) -> _Layer:
    for norm in (part.attention_norm, part.after_attention_norm, part.mlp_norm, part.after_mlp_norm):
        assert norm is None or (norm.dtype is torch.float32 and norm.is_contiguous()), "a norm of another type"
    return _Layer(
        *(address(part.attention_norm), address(part.after_attention_norm)),
        *(address(part.mlp_norm), address(part.after_mlp_norm)),
        *(part.qkv.address, part.output.address, part.write.address, part.attention.address),
        *(None if linear is None else linear.address for linear in (part.gate_up, part.down)),
        *(None if mixture is None else ctypes.addressof(mixture), part.rope),
    )


def _mixture(mixture: Mixture) -> _Mixture:
    g, experts = mixture.gating, mixture.experts
    return _Mixture(
        *(mixture.router.address, *experts.addresses, address(mixture.score_bias)),
        *(experts.num_experts, g.top_k, g.renormalize, g.scores == "sigmoid"),
        *(g.num_groups, g.top_groups, g.group_best, g.scale),
    )
