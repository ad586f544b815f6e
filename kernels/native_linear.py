"""Linear layers over the C++ kernels: weights packed in panels, as `csrc/matmul.h` describes them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.activation import Activation
from kernels.memory import Allocate
from kernels.native import native_function
from kernels.quantize import Precision, QuantizedWeight, quantize_weight

WeightPart = Tensor | QuantizedWeight
"""Rows of a weight, [N_i, K], as a checkpoint holds them: floating-point of any kind, or codes."""

_FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_KINDS = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3, "codes4": 4, "codes8": 5}
_ACTIVATIONS = {"none": 0, "silu": 1, "gelu_tanh": 2, "swigluoai": 3}
_PLAIN, _GATE, _UP = range(3)
_LANES, _PANEL = 16, 32
_ROWS_AT_ONCE = 256
"""Rows that are converted in one piece, so that loading never holds a second copy of a large weight."""


class Weights(ctypes.Structure):
    """`Weights` of csrc/matmul.h."""

    _fields_ = (
        ("kind", ctypes.c_int32),
        ("activation", ctypes.c_int32),
        ("n", ctypes.c_int64),
        ("k", ctypes.c_int64),
        ("group_size", ctypes.c_int64),
        ("data", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("offsets", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
    )


class PackedWeight:
    """A weight in panels: `struct` is what the kernels read, and points into tensors that live as long as this."""

    def __init__(self, kind: str, n: int, k: int, group_size: int, activation: str, allocate: Allocate) -> None:
        self.kind, self.gated = kind, activation != "none"
        self.struct = Weights(_KINDS[kind], _ACTIVATIONS[activation], n, k, group_size)
        self._num_panels = -(-n // (_LANES if self.gated else _PANEL))
        num_bytes = ctypes.c_int64()
        native_function("penstock_packed_bytes", "pp")(ctypes.addressof(self.struct), ctypes.addressof(num_bytes))
        self._data = allocate(num_bytes.value)
        self.struct.data = self._data.data_ptr()
        shape = (self._num_panels, k // group_size if kind.startswith("codes") else 1, _PANEL)
        self._scales = torch.zeros(shape) if kind in ("int8", "codes4", "codes8") else None
        self._offsets = torch.zeros(shape) if kind.startswith("codes") else None
        self._sums = torch.zeros(shape, dtype=torch.int32) if kind == "int8" else None
        for name in ("scales", "offsets", "sums"):
            tensor = getattr(self, f"_{name}")
            setattr(self.struct, name, None if tensor is None else tensor.data_ptr())
        self._bias: Tensor | None = None

    def put(self, part: WeightPart, place: int, first: int) -> None:
        """Rows of the weight become features [first, first + N_i)."""
        num_rows = (part.codes if isinstance(part, QuantizedWeight) else part).shape[0]
        for start in range(0, num_rows, _ROWS_AT_ONCE):
            rows = slice(start, min(start + _ROWS_AT_ONCE, num_rows))
            if isinstance(part, QuantizedWeight):
                zeros = None if part.zeros is None else part.zeros[rows]
                codes = QuantizedWeight(part.codes[rows], part.scales[rows], zeros, part.group_size, part.num_bits)
                self._put_codes(codes, place, first + start)
            elif self.kind in _FLOATS:
                self._put_rows(part[rows].to(_FLOATS[self.kind]), place, first + start)
            else:
                num_bits = 8 if self.kind == "int8" else 4
                self._put_codes(quantize_weight(part[rows], num_bits, self.struct.group_size), place, first + start)

    def put_bias(self, bias: Tensor, place: int) -> None:
        if self._bias is None:
            self._bias = torch.zeros(self._num_panels, 1, _PANEL)
            self.struct.bias = self._bias.data_ptr()
        self._put_lanes(self._bias, bias.to(torch.float32).unsqueeze(1), place, 0)

    def _put_rows(self, rows: Tensor, place: int, first: int) -> None:
        rows = rows.contiguous()
        pack = native_function("penstock_pack", "ppqiq")
        pack(ctypes.addressof(self.struct), rows.data_ptr(), rows.shape[0], place, first)

    def _put_codes(self, weight: QuantizedWeight, place: int, first: int) -> None:
        assert self._scales is not None, "codes in a layer of floats"
        codes, zeros = weight.codes, weight.zeros
        if self.kind == "codes4":
            if zeros is None:
                codes = codes + 8
            nibbles = codes.view(codes.shape[0], -1, 2)
            self._put_rows(nibbles[:, :, 0] | (nibbles[:, :, 1] << 4), place, first)
        else:
            self._put_rows(codes, place, first)
        self._put_lanes(self._scales, weight.scales, place, first)
        if self._sums is not None:
            self._put_lanes(self._sums, 128 * codes.sum(dim=1, keepdim=True, dtype=torch.int32), place, first)
        if self._offsets is not None:
            shift = 8 if self.kind == "codes4" and zeros is None else 0
            offsets = -weight.scales * (shift if zeros is None else zeros.to(torch.float32))
            self._put_lanes(self._offsets, offsets, place, first)

    def _put_lanes(self, lanes: Tensor, values: Tensor, place: int, first: int) -> None:
        """values: [N_i, G], of features [first, first + N_i); lanes: [P, G, 32]"""
        features = torch.arange(first, first + values.shape[0])
        width = _LANES if self.gated else _PANEL
        lane = features % width + (_LANES if place == _UP else 0)
        lanes[features // width, :, lane] = values.to(lanes.dtype)


class NativeLinear:
    """A layer of `kernels/linear.py` whose weight is packed."""

    def __init__(self, weight: PackedWeight) -> None:
        self.weight = weight
        self.in_features, self.out_features = int(weight.struct.k), int(weight.struct.n)
        self._run = native_function("penstock_linear", "ppqpp")
        self.address = ctypes.addressof(weight.struct)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """x: [T, K] float32; residual: [T, N]; returns [T, N]."""
        num_rows = x.shape[0]
        out = torch.empty((num_rows, self.out_features))
        x = x.contiguous()
        if residual is not None:
            residual = residual.contiguous()
        added = None if residual is None else residual.data_ptr()
        self._run(self.address, x.data_ptr(), num_rows, added, out.data_ptr())
        return out


def pack_linear(
    parts: Sequence[WeightPart], bias: Tensor | None, precision: Precision, group_size: int, allocate: Allocate
) -> NativeLinear:
    n = sum(num_rows for num_rows, _ in map(_shape, parts))
    weight = _empty(parts[0], n, precision, group_size, "none", allocate)
    first = 0
    for part in parts:
        weight.put(part, _PLAIN, first)
        first += _shape(part)[0]
    if bias is not None:
        weight.put_bias(bias, _PLAIN)
    return NativeLinear(weight)


def pack_gated_linear(
    gate: WeightPart,
    up: WeightPart,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    precision: Precision,
    activation: Activation,
    group_size: int,
    allocate: Allocate,
) -> NativeLinear:
    weight = _empty(gate, _shape(gate)[0], precision, group_size, activation, allocate)
    for part, bias, place in ((gate, gate_bias, _GATE), (up, up_bias, _UP)):
        weight.put(part, place, 0)
        if bias is not None:
            weight.put_bias(bias, place)
    return NativeLinear(weight)


def _shape(part: WeightPart) -> tuple[int, int]:
    num_rows, num_columns = (part.codes if isinstance(part, QuantizedWeight) else part).shape
    return num_rows, num_columns


def _empty(
    part: WeightPart, n: int, precision: Precision, group_size: int, activation: str, allocate: Allocate
) -> PackedWeight:
    """Room for a layer like `part`: codes stay as they are, floats are stored as `precision` says."""
    k = _shape(part)[1]
    if isinstance(part, Tensor) and precision in _FLOATS:
        return PackedWeight(precision, n, k, k, activation, allocate)
    first = (
        part
        if isinstance(part, QuantizedWeight)
        else quantize_weight(part[:1], 8 if precision == "int8" else 4, group_size)
    )
    whole_rows = first.num_bits == 8 and first.group_size == k and first.zeros is None
    packs_in_pairs = first.num_bits == 4 and first.group_size % 2 == 0
    kind = "int8" if whole_rows else "codes4" if packs_in_pairs else "codes8"
    return PackedWeight(kind, n, k, first.group_size, activation, allocate)
