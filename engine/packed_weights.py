"""Weights that a checkpoint stores as codes, taken out of their layouts. `engine/quantization.py` names the tensors.

N rows, K columns, G groups of columns. Columns of a group that do not lie side by side (act-order) are sorted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from engine.quantization import Method, Scheme
from engine.reordered import ReorderedWeight
from kernels.native_linear import WeightPart
from kernels.quantize import QuantizedWeight

StoredPart = WeightPart | ReorderedWeight

_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Column j of eight is the _AWQ_ORDER[j]-th nibble of a word, the lowest first."""
_FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""By exponent and mantissa; the highest bit is the sign (OCP Microscaling Formats 1.0)."""


def unpack_weight(scheme: Scheme, stored: Mapping[str, Tensor]) -> StoredPart:
    """The weight [N, K] that the tensors stand for; their names are what follows the module's in `Scheme.stored`."""
    return _UNPACK[scheme.method](scheme, stored)


def _gptq(scheme: Scheme, stored: Mapping[str, Tensor]) -> StoredPart:
    codes = _unpack(stored["qweight"].t(), scheme.num_bits)
    zeros = _unpack(stored["qzeros"], scheme.num_bits).t()
    if scheme.zeros_less_one:
        zeros = (zeros + 1) & (2**scheme.num_bits - 1)
    return _weight(scheme, codes, stored["scales"].t(), zeros, stored["g_idx"])


def _awq(scheme: Scheme, stored: Mapping[str, Tensor]) -> StoredPart:
    codes, zeros = (
        _unpack(stored[name], 4).view(stored[name].shape[0], -1, 8)[..., list(_AWQ_ORDER)].flatten(1).t()
        for name in ("qweight", "qzeros")
    )
    return _weight(scheme, codes, stored["scales"].t(), zeros, None)


def _int8(_scheme: Scheme, stored: Mapping[str, Tensor]) -> StoredPart:
    codes = stored["weight"]
    return QuantizedWeight(codes, stored["weight_scale"].to(torch.float32), None, codes.shape[1], 8)


def _packed(scheme: Scheme, stored: Mapping[str, Tensor]) -> StoredPart:
    num_rows, num_columns = stored["weight_shape"].tolist()
    codes = _unpack(stored["weight_packed"], scheme.num_bits)[:, :num_columns]
    zeros = torch.full_like(stored["weight_scale"], 2 ** (scheme.num_bits - 1), dtype=torch.int32)
    if scheme.has_zeros:
        zeros = _unpack(stored["weight_zero_point"].t(), scheme.num_bits)[:, :num_rows].t()
    return _weight(scheme, codes, stored["weight_scale"], zeros, stored.get("weight_g_idx"))


def _mxfp4(_scheme: Scheme, stored: Mapping[str, Tensor]) -> StoredPart:
    """blocks: [N, G, 16] uint8, two values of 4 bits a byte, the lower first; scales: [N, G] uint8, exponents of two
    plus 127."""
    values = torch.tensor([*_FP4_VALUES, *(-value for value in _FP4_VALUES)], dtype=torch.bfloat16)  # all are exact
    nibbles = torch.stack((stored["blocks"] & 15, stored["blocks"] >> 4), dim=-1).flatten(2)
    exponents = stored["scales"].to(torch.int32).unsqueeze(2) - 127
    weight: Tensor = torch.ldexp(values[nibbles.to(torch.int64)], exponents).flatten(1)
    return weight


_UNPACK: Mapping[Method, Callable[[Scheme, Mapping[str, Tensor]], StoredPart]] = {
    "gptq": _gptq,
    "awq": _awq,
    "int8": _int8,
    "packed": _packed,
    "mxfp4": _mxfp4,
}


def _unpack(words: Tensor, num_bits: int) -> Tensor:
    """words: [A, B] int32; returns the codes [A, B * 32 / num_bits] int32 in them, the lowest bits first."""
    shifts = torch.arange(0, 32, num_bits, dtype=torch.int32)
    codes: Tensor = (words.unsqueeze(2) >> shifts) & (2**num_bits - 1)
    return codes.flatten(1)


def _weight(scheme: Scheme, codes: Tensor, scales: Tensor, zeros: Tensor, groups: Tensor | None) -> StoredPart:
    """codes: [N, K], from 0 on; scales, zeros: [N, G]; groups: [K], the group of each column, if they may be mixed."""
    num_columns = codes.shape[1]
    group_size = scheme.group_size or num_columns
    in_order = torch.arange(num_columns, dtype=torch.int32) // group_size
    wide = scales.to(torch.float32).contiguous()
    order = None if groups is None or torch.equal(groups, in_order) else groups.argsort(stable=True)
    if groups is not None and order is not None:
        if not torch.equal(groups[order], in_order):  # of different sizes
            index = groups.to(torch.int64)
            return (codes - zeros[:, index]).to(torch.float32) * wide[:, index]
        codes = codes[:, order]
    middle = 2 ** (scheme.num_bits - 1)
    symmetric = scheme.num_bits == 4 and bool((zeros == middle).all())
    if symmetric or scheme.num_bits == 8:
        codes, zeros = codes - middle, zeros - middle
    weight = QuantizedWeight(
        codes.to(torch.int8).contiguous(),
        wide,
        None if symmetric else zeros.to(torch.int8).contiguous(),  # of 8 bits, zeros tell weight-only from W8A8
        group_size,
        scheme.num_bits,
    )
    return weight if order is None else ReorderedWeight(weight, order)
