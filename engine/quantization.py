"""Checkpoints whose linear layers are stored as codes: which formats, and what they call their tensors. No torch.

GPTQ (AutoGPTQ, GPTQModel), AWQ (AutoAWQ, "gemm"), compressed-tensors ("int-quantized" W8A8 and "pack-quantized"), and
gpt-oss's MXFP4 experts. `engine/packed_weights.py` turns the tensors into weights.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from engine.json_fields import Fields

Method = Literal["gptq", "awq", "int8", "packed", "mxfp4"]
Stored = dict[str, tuple[tuple[int, ...], tuple[str, ...]]]
"""Tensors by name, with shape and possible types."""

_FLOATS = ("F32", "BF16", "F16")
_MXFP4_GROUP = 32


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a weight [N, K] is stored."""

    method: Method
    num_bits: int = 4
    group_size: int | None = None
    """Columns that share a scale; None: the whole row."""
    has_zeros: bool = False
    has_group_index: bool = False
    """compressed-tensors only; GPTQ always has one."""
    zeros_less_one: bool = False
    """GPTQ's first format stores zero points less one."""

    def stored(self, module: str, shape: tuple[int, ...]) -> Stored:
        """The tensors that stand for the module's weight [N, K]; in MXFP4, for [E, K, N], those of all experts."""
        if self.method == "mxfp4":
            num_experts, num_columns, num_rows = shape
            groups = (num_experts, num_rows, num_columns // _MXFP4_GROUP)
            blocks = (*groups, _MXFP4_GROUP // 2)
            return {f"{module}_blocks": (blocks, ("U8",)), f"{module}_scales": (groups, ("U8",))}
        return {f"{module}.{name}": stored for name, stored in self._stored(*shape).items()}

    def _stored(self, num_rows: int, num_columns: int) -> Stored:
        per_word = 32 // self.num_bits
        num_groups = num_columns // (self.group_size or num_columns)
        if self.method == "int8":
            return {"weight": ((num_rows, num_columns), ("I8",)), "weight_scale": ((num_rows, 1), _FLOATS)}
        if self.method == "packed":
            return self._packed(num_rows, num_columns, num_groups)
        by_column = self.method == "gptq"
        stored: Stored = {
            "qweight": (
                (num_columns // per_word, num_rows) if by_column else (num_columns, num_rows // per_word),
                ("I32",),
            ),
            "qzeros": ((num_groups, num_rows // per_word), ("I32",)),
            "scales": ((num_groups, num_rows), _FLOATS),
        }
        if by_column:
            stored["g_idx"] = ((num_columns,), ("I32",))
        return stored

    def _packed(self, num_rows: int, num_columns: int, num_groups: int) -> Stored:
        per_word = 32 // self.num_bits
        stored: Stored = {
            "weight_packed": ((num_rows, -(-num_columns // per_word)), ("I32",)),
            "weight_scale": ((num_rows, num_groups), _FLOATS),
            "weight_shape": ((2,), ("I64", "I32")),
        }
        if self.has_zeros:
            stored["weight_zero_point"] = ((-(-num_rows // per_word), num_groups), ("I32",))
        if self.has_group_index:
            stored["weight_g_idx"] = ((num_columns,), ("I32",))
        return stored


@dataclass(frozen=True, slots=True)
class Quantization:
    """Which linear layer is stored how. A layer whose `weight` holds floats is not quantised, whatever is said here."""

    schemes: tuple[tuple[tuple[str, ...], Scheme], ...]
    """Targets: names of modules, "re:" and a regular expression, or "Linear" for all; the first that fits counts."""
    ignored: tuple[str, ...] = ()

    def scheme(self, module: str) -> Scheme | None:
        """How the module of that name is stored; None: as floats."""
        if any(_fits(target, module) for target in self.ignored):
            return None
        fitting = (scheme for targets, scheme in self.schemes if any(_fits(target, module) for target in targets))
        return next(fitting, None)


def _fits(target: str, module: str) -> bool:
    if target.startswith("re:"):
        return re.match(target[3:], module) is not None
    return target == "Linear" or module == target or module.endswith("." + target)


def read_quantization(fields: Fields) -> Quantization | None:
    """From `quantization_config` of config.json; `CheckpointError` for a format that can't be read exactly."""
    config = fields.group("quantization_config")
    if config is None:
        return None
    match config.get("quant_method"):
        case "gptq":
            return Quantization(((("Linear",), _gptq(config)),))
        case "awq":
            return Quantization(((("Linear",), _awq(config)),))
        case "compressed-tensors":
            return _compressed_tensors(config)
        case "mxfp4":
            return Quantization(((("re:.*\\.experts\\.(gate_up|down)_proj",), Scheme("mxfp4", 4, _MXFP4_GROUP)),))
    raise config.error("quant_method", "must be gptq, awq, compressed-tensors or mxfp4; use the original checkpoint")


def _gptq(config: Fields) -> Scheme:
    """Act-order (`desc_act`) shows in the tensors themselves."""
    if config.get("dynamic"):
        raise config.error("dynamic", "but settings that differ by module are not supported")
    old = config.get("checkpoint_format") in (None, "gptq")
    if not old and config.get("checkpoint_format") != "gptq_v2":
        raise config.error("checkpoint_format", "must be gptq or gptq_v2")
    return Scheme("gptq", _bits(config, "bits"), _group_size(config), has_zeros=True, zeros_less_one=old)


def _awq(config: Fields) -> Scheme:
    if str(config.get("version") or "gemm").lower() != "gemm":
        raise config.error("version", "must be gemm; other layouts of AWQ are not supported")
    key = "bits" if config.get("bits") is not None else "w_bit"
    if config.integer(key) != 4:
        raise config.error(key, "must be 4")
    return Scheme("awq", 4, _group_size(config), has_zeros=True)


def _bits(config: Fields, key: str) -> int:
    if config.get(key) not in (4, 8):
        raise config.error(key, "must be 4 or 8")
    return config.integer(key)


def _group_size(config: Fields) -> int | None:
    """-1, and in compressed-tensors null, stand for the whole row."""
    key = "group_size" if config.get("group_size") is not None else "q_group_size"
    return None if config.get(key) in (None, -1) else config.integer(key)


def _compressed_tensors(config: Fields) -> Quantization:
    groups = config.group("config_groups")
    if groups is None or not groups.names():
        raise config.error("config_groups", "must describe at least one group of layers")
    if config.get("kv_cache_scheme") is not None:
        raise config.error("kv_cache_scheme", "but calibrated KV caches are not supported; set engine.kv_cache_dtype")
    sparsity = config.group("sparsity_config")
    if sparsity is not None and sparsity.get("format") not in (None, "dense"):
        raise sparsity.error("format", "must be dense; sparse checkpoints are not supported")
    if config.get("transform_config"):
        raise config.error("transform_config", "but transforms of activations are not supported")
    schemes = []
    for name in groups.names():
        group = groups.group(name)
        if group is None:
            raise groups.error(name, "must be an object")
        schemes.append((_strings(group, "targets"), _group_scheme(config, group)))
    return Quantization(tuple(schemes), _strings(config, "ignore"))


def _group_scheme(config: Fields, group: Fields) -> Scheme:
    """W8A8: a scale for each row, activations rounded token by token. W4A16 and W8A16: weights only, packed."""
    weights, activations = group.group("weights"), group.group("input_activations")
    if weights is None:
        raise group.error("weights", "must describe how weights are stored")
    if weights.get("type") not in (None, "int") or weights.get("num_bits") not in (4, 8):
        raise weights.error("num_bits", f"of type {weights.get('type')}: must be int of 4 or 8 bits")
    symmetric, strategy = weights.boolean("symmetric", default=True), weights.get("strategy")
    group_size = _group_size(weights)
    if strategy not in (None, "channel", "group") or (strategy == "group") != (group_size is not None):
        raise weights.error("strategy", "must be channel, or group with a group_size")
    own_format = group.get("format") or config.get("format")
    if activations is None:
        if own_format != "pack-quantized":
            raise config.error("format", "must be pack-quantized where activations are not quantised")
        has_group_index = weights.get("actorder") in ("group", "dynamic", True)
        return Scheme("packed", _bits(weights, "num_bits"), group_size, not symmetric, has_group_index)
    dynamic = activations.get("dynamic") is True and activations.get("strategy") in (None, "token")
    if not dynamic or activations.get("num_bits") != 8 or not activations.boolean("symmetric", default=True):
        raise group.error("input_activations", "must be 8 bits, symmetric, dynamic, token by token; or left out")
    by_row = weights.get("num_bits") == 8 and group_size is None and symmetric
    if own_format not in ("int-quantized", "naive-quantized") or not by_row:
        raise group.error("weights", "must be 8 bits, symmetric, a scale for each channel, with quantised activations")
    return Scheme("int8", 8)


def _strings(fields: Fields, name: str) -> tuple[str, ...]:
    values: Any = fields.get(name) or []
    if not isinstance(values, list) or any(not isinstance(value, str) for value in values):
        raise fields.error(name, "must be a list of names")
    return tuple(values)
