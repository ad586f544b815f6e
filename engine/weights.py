"""Weights in memory, and how they get there from a checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import overload

import torch
from torch import Tensor

from core.errors import CheckpointError
from engine.checkpoint import Checkpoint
from engine.model_config import LatentConfig, ModelConfig
from engine.packed_weights import StoredPart, unpack_weight
from engine.parameters import (
    HeadsSources,
    LatentSources,
    LinearSources,
    MLPSources,
    MoESources,
    Source,
    layer_sources,
    model_sources,
)
from engine.reordered import ReorderedGatedLinear, ReorderedLinear, ReorderedWeight
from engine.tensor_check import check_tensors, stored_scheme, superfluous_biases
from engine.tensor_files import TensorFiles
from kernels.experts import Experts, make_experts
from kernels.linear import GatedLinear, Linear, make_gated_linear, make_linear
from kernels.memory import give_back
from kernels.native_linear import WeightPart
from kernels.quantize import Precision, QuantizedWeight


@dataclass(frozen=True, slots=True)
class Storage:
    """What weights are held in. Layers whose weights are codes in the checkpoint keep those."""

    precision: Precision
    head_precision: Precision
    """Of the output matrix."""
    dtype: torch.dtype
    """Of activations, norms and biases."""
    device: torch.device


@dataclass(frozen=True, slots=True)
class HeadsWeights:
    """C hidden size, H query heads, K KV heads, D head size."""

    qkv: Linear
    """C to (H + 2K) D"""
    output: Linear
    """H D to C"""
    q_norm: Tensor | None
    k_norm: Tensor | None
    """[D], or over all heads [H D] and [K D]"""
    sinks: Tensor | None
    """[H] float32"""


@dataclass(frozen=True, slots=True)
class LatentWeights:
    """H query heads; R size of the latent vector; N, P and V sizes of a head's plain, rotary and value part."""

    q_down: Linear | None
    q_down_norm: Tensor | None
    q: Linear
    """to H (N + P)"""
    kv_down: Linear
    """C to R + P"""
    kv_down_norm: Tensor
    """[R]"""
    k_up: tuple[Linear, ...]
    """One a head, N to R: what makes K of a latent vector, transposed, so that it turns Q into its space instead."""
    v_up: tuple[Linear, ...]
    """One a head, R to V."""
    output: Linear
    """H V to C"""


@dataclass(frozen=True, slots=True)
class MLPWeights:
    gate_up: GatedLinear
    down: Linear


@dataclass(frozen=True, slots=True)
class MoEWeights:
    router: Linear
    """In float32, whatever the model is in."""
    score_bias: Tensor | None
    """[E] float32"""
    experts: Experts
    shared: MLPWeights | None


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """Norms are [C]."""

    attention_norm: Tensor
    after_attention_norm: Tensor | None
    mlp_norm: Tensor
    after_mlp_norm: Tensor | None
    attention: HeadsWeights | LatentWeights
    mlp: MLPWeights | MoEWeights


@dataclass(frozen=True, slots=True)
class ModelWeights:
    embedding: Tensor
    """[V, C]; on CPU a view into the checkpoint's file, of the type that it is stored in."""
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    output: Linear
    """C to V"""


def load_weights(folder: str | Path, config: ModelConfig, storage: Storage) -> ModelWeights:
    """Read a checkpoint's tensors once, layer by layer, from mapped files into the form that `storage` asks for.

    Raises `CheckpointError` that names file and tensor where one is missing, unexpected, or has another shape than
    config.json says. All of that is checked before the first tensor is read.
    """
    checkpoint = Checkpoint.open(folder)
    check_tensors(checkpoint, config)
    return _Loader(checkpoint, config, storage).model()


class _Loader:
    def __init__(self, checkpoint: Checkpoint, config: ModelConfig, storage: Storage) -> None:
        self._checkpoint, self._config, self._storage = checkpoint, config, storage
        self._files = TensorFiles(checkpoint)

    def model(self) -> ModelWeights:
        for name in superfluous_biases(self._checkpoint, self._config):
            if self._files.read(name).any():
                raise CheckpointError(
                    f"{self._checkpoint.folder}: bias {name} is not zero, but the model has none there"
                )
        sources = model_sources(self._config)
        embedding = self._files.read(sources.embedding.name)
        if self._storage.device.type != "cpu":
            embedding = embedding.to(self._storage.device, self._storage.dtype)
        layers = tuple(self._layer(i) for i in range(self._config.num_layers))
        tied = LinearSources((sources.embedding,))
        output = self._linear(sources.output or tied, self._storage.head_precision)
        norm = self._norm(sources.norm)
        give_back()
        return ModelWeights(embedding, layers, norm, output)

    def _layer(self, index: int) -> LayerWeights:
        sources = layer_sources(self._config, index)
        attention, mlp = sources.attention, sources.mlp
        give_back()
        return LayerWeights(
            attention_norm=self._norm(sources.attention_norm),
            after_attention_norm=self._optional_norm(sources.after_attention_norm),
            mlp_norm=self._norm(sources.mlp_norm),
            after_mlp_norm=self._optional_norm(sources.after_mlp_norm),
            attention=self._heads(attention) if isinstance(attention, HeadsSources) else self._latent(attention),
            mlp=self._mlp(mlp) if isinstance(mlp, MLPSources) else self._moe(mlp),
        )

    def _heads(self, sources: HeadsSources) -> HeadsWeights:
        return HeadsWeights(
            qkv=self._linear(sources.qkv),
            output=self._linear(sources.output),
            q_norm=self._optional_norm(sources.q_norm),
            k_norm=self._optional_norm(sources.k_norm),
            sinks=None if sources.sinks is None else self._vector(sources.sinks, torch.float32),
        )

    def _latent(self, sources: LatentSources) -> LatentWeights:
        latent = self._config.latent
        assert latent is not None, "weights of latent attention for a model without"
        k_up, v_up = self._absorbed(sources.kv, latent)
        return LatentWeights(
            q_down=None if sources.q_down is None else self._linear(sources.q_down),
            q_down_norm=self._optional_norm(sources.q_down_norm),
            q=self._linear(sources.q),
            kv_down=self._linear(sources.kv_down),
            kv_down_norm=self._norm(sources.kv_down_norm),
            k_up=k_up,
            v_up=v_up,
            output=self._linear(sources.output),
        )

    def _absorbed(self, source: Source, latent: LatentConfig) -> tuple[tuple[Linear, ...], tuple[Linear, ...]]:
        """As floats: what is rounded row by row for K would be rounded column by column for Q."""
        part = self._part(source)
        weight = part if isinstance(part, Tensor) else part.dequantize()
        heads = weight.view(self._config.num_heads, latent.nope_size + latent.v_size, latent.kv_rank)
        precision = self._float_precision()
        return (
            tuple(make_linear([head[: latent.nope_size].t()], None, precision) for head in heads),
            tuple(make_linear([head[latent.nope_size :]], None, precision) for head in heads),
        )

    def _mlp(self, sources: MLPSources) -> MLPWeights:
        (gate, up), order = _uniform([self._part(sources.gate.weights[0]), self._part(sources.up.weights[0])])
        precision, activation = self._storage.precision, self._config.activation
        gate_up = make_gated_linear(gate, up, None, None, precision, activation)
        if order is not None:
            gate_up = ReorderedGatedLinear(gate_up, order)
        self._files.release_pages()
        return MLPWeights(gate_up, self._linear(sources.down))

    def _moe(self, sources: MoESources) -> MoEWeights:
        num_experts, bias = len(sources.experts), sources.score_bias
        at_hand: dict[int, list[WeightPart]] = {}  # gate and up of the expert that is packed

        def gate_up(e: int) -> list[WeightPart]:
            if e not in at_hand:
                self._files.release_pages()
                at_hand.clear()
                at_hand[e] = _in_own_order(
                    [self._part(sources.experts[e].gate.weights[0]), self._part(sources.experts[e].up.weights[0])]
                )
            return at_hand[e]

        def down(e: int) -> WeightPart:
            self._files.release_pages()
            return _in_own_order([self._part(sources.experts[e].down.weights[0])])[0]

        experts = make_experts(
            _OneByOne(num_experts, lambda e: gate_up(e)[0]),
            _OneByOne(num_experts, lambda e: gate_up(e)[1]),
            _OneByOne(num_experts, down),
            self._storage.precision,
            self._config.activation,
            gate_bias=self._biases([expert.gate for expert in sources.experts]),
            up_bias=self._biases([expert.up for expert in sources.experts]),
            down_bias=self._biases([expert.down for expert in sources.experts]),
        )
        return MoEWeights(
            router=self._linear(sources.router, "float32"),
            score_bias=None if bias is None else self._vector(bias, torch.float32),
            experts=experts,
            shared=None if sources.shared is None else self._mlp(sources.shared),
        )

    def _biases(self, linears: Sequence[LinearSources]) -> list[Tensor] | None:
        return [self._vector(bias, self._storage.dtype) for linear in linears for bias in linear.biases] or None

    def _linear(self, sources: LinearSources, precision: Precision | None = None) -> Linear:
        parts, order = _uniform([self._part(source) for source in sources.weights])
        dtype = torch.float32 if precision == "float32" else self._storage.dtype
        biases = [self._vector(source, dtype) for source in sources.biases]
        linear = make_linear(parts, torch.cat(biases) if biases else None, precision or self._storage.precision)
        self._files.release_pages()
        return linear if order is None else ReorderedLinear(linear, order)

    def _float_precision(self) -> Precision:
        return self._storage.precision if self._storage.precision not in ("int8", "int4") else "float32"

    def _optional_norm(self, source: Source | None) -> Tensor | None:
        return None if source is None else self._norm(source)

    def _norm(self, source: Source) -> Tensor:
        offset = self._config.family.norm_offset
        return (self._vector(source, torch.float32) + offset).to(self._storage.dtype)

    def _vector(self, source: Source, dtype: torch.dtype) -> Tensor:
        vector = _rows(_expert(self._files.read(source.name), source), source.rows)
        return vector.to(self._storage.device, dtype, copy=True)

    def _part(self, source: Source) -> StoredPart:
        """A weight, or rows of it: on CPU a view into the file where it is stored as floats."""
        scheme = stored_scheme(self._checkpoint, self._config, source)
        if scheme is None:
            matrix = _expert(self._files.read(source.name), source)
            return self._place(_rows(matrix.t() if source.transposed else matrix, source.rows))
        module = source.name.removesuffix(".weight")
        stored = {
            name[len(module) + 1 :]: _expert(self._files.read(name), source)
            for name in scheme.stored(module, source.shape)
        }
        return self._place(_part_rows(unpack_weight(scheme, stored), source.rows))

    def _place(self, part: StoredPart) -> StoredPart:
        placed = _map(part, lambda tensor: tensor.to(self._storage.device))
        if isinstance(placed, ReorderedWeight):
            return replace(placed, order=placed.order.to(self._storage.device))
        return placed


def _expert(tensor: Tensor, source: Source) -> Tensor:
    return tensor if source.expert is None else tensor[source.expert]


def _rows(tensor: Tensor, rows: slice | tuple[int, ...] | None) -> Tensor:
    if rows is None:
        return tensor
    return tensor[rows] if isinstance(rows, slice) else tensor[list(rows)]


def _part_rows(part: StoredPart, rows: slice | tuple[int, ...] | None) -> StoredPart:
    return _map(part, lambda tensor: _rows(tensor, rows))


def _map(part: StoredPart, change: Callable[[Tensor], Tensor]) -> StoredPart:
    """The same change to all that has a row for each of the weight's."""
    if isinstance(part, Tensor):
        return change(part)
    if isinstance(part, ReorderedWeight):
        return replace(part, weight=_map_codes(part.weight, change))
    return _map_codes(part, change)


def _map_codes(codes: QuantizedWeight, change: Callable[[Tensor], Tensor]) -> QuantizedWeight:
    zeros = None if codes.zeros is None else change(codes.zeros)
    return replace(codes, codes=change(codes.codes), scales=change(codes.scales), zeros=zeros)


def _uniform(parts: Sequence[StoredPart]) -> tuple[list[WeightPart], Tensor | None]:
    """Parts of one layer, codes of one kind or else floats, and the order of their columns."""
    orders = [part.order for part in parts if isinstance(part, ReorderedWeight)]
    ordered = len(orders) == len(parts) and all(torch.equal(order, orders[0]) for order in orders)
    codes = [part.weight if isinstance(part, ReorderedWeight) else part for part in parts]
    kinds = {
        (part.num_bits, part.group_size, part.zeros is None) for part in codes if isinstance(part, QuantizedWeight)
    }
    in_codes = all(isinstance(part, QuantizedWeight) for part in codes) and len(kinds) == 1
    if in_codes and (ordered or not orders):
        return codes, orders[0] if orders else None
    return [part if isinstance(part, Tensor) else part.dequantize() for part in parts], None


def _in_own_order(parts: Sequence[StoredPart]) -> list[WeightPart]:
    """The same for layers that can't reorder their input."""
    return _uniform([part.dequantize() if isinstance(part, ReorderedWeight) else part for part in parts])[0]


class _OneByOne(Sequence[WeightPart]):
    """Parts that are made when they are asked for, so that those of one expert at a time are in memory."""

    def __init__(self, count: int, make: Callable[[int], WeightPart]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> WeightPart: ...
    @overload
    def __getitem__(self, index: slice) -> list[WeightPart]: ...
    def __getitem__(self, index: int | slice) -> WeightPart | list[WeightPart]:
        if isinstance(index, slice):
            return [self._make(i) for i in range(*index.indices(self._count))]
        return self._make(range(self._count)[index])
