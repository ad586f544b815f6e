"""Checkpoints of codes in the layouts that their tools publish, written here by hand from codes that are known."""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.errors import CheckpointError
from engine.config import EngineConfig
from engine.model_config import ModelConfig
from engine.packed_weights import unpack_weight
from engine.quantization import Scheme
from engine.reordered import ReorderedWeight
from kernels.quantize import QuantizedWeight
from tests.engine.model_logits import logits_of

TOLERANCE = 2e-4


AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def pack(codes: Tensor, num_bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """codes: [A, B], not negative; returns [A, B * num_bits / 32] int32: code i of a word is its column `order[i]`."""
    per_word = 32 // num_bits
    columns = order or tuple(range(per_word))
    words = [
        [sum(row[start + c] << (num_bits * i) for i, c in enumerate(columns)) for start in range(0, len(row), per_word)]
        for row in codes.tolist()
    ]
    return torch.tensor([[w - 2**32 if w >= 2**31 else w for w in row] for row in words], dtype=torch.int32)


@dataclass(frozen=True)
class Codes:
    """A weight [N, K] from 0 on, with scales and zeros [N, G], and the group [K] of each column."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    groups: Tensor

    @property
    def weight(self) -> Tensor:
        index = self.groups.long()
        return (self.codes - self.zeros[:, index]).float() * self.scales.float()[:, index]


def gptq(c: Codes, num_bits: int, less: int) -> dict[str, Tensor]:
    """Words go down the columns."""
    return {
        "qweight": pack(c.codes, num_bits).t().contiguous(),
        "qzeros": pack((c.zeros.t() - less) & (2**num_bits - 1), num_bits),
        "scales": c.scales.t().contiguous(),
        "g_idx": c.groups,
    }


def awq(c: Codes) -> dict[str, Tensor]:
    return {
        "qweight": pack(c.codes.t(), 4, AWQ_ORDER),
        "qzeros": pack(c.zeros.t(), 4, AWQ_ORDER),
        "scales": c.scales.t().contiguous(),
    }


def packed(c: Codes, num_bits: int, *, zeros: bool = False, groups: bool = False) -> dict[str, Tensor]:
    stored = {
        "weight_packed": pack(c.codes, num_bits),
        "weight_scale": c.scales,
        "weight_shape": torch.tensor(c.codes.shape),
    }
    if zeros:
        stored["weight_zero_point"] = pack(c.zeros.t(), num_bits).t().contiguous()
    if groups:
        stored["weight_g_idx"] = c.groups
    return stored


def int8(c: Codes) -> dict[str, Tensor]:
    return {"weight": (c.codes - 128).to(torch.int8), "weight_scale": c.scales}


def compressed(weights: dict[str, Any], fmt: str = "pack-quantized", **more: Any) -> dict[str, Any]:
    base = {"type": "int", "symmetric": True, "num_bits": 4}
    group = {"targets": ["Linear"], "weights": base | weights, "input_activations": more.pop("input_activations", None)}
    return {"quant_method": "compressed-tensors", "format": fmt, "config_groups": {"group_0": group}} | more


@dataclass(frozen=True)
class Layout:
    """How a weight is written, what config.json says of it, and how the engine must understand it."""

    config: dict[str, Any]
    write: Callable[[Codes], dict[str, Tensor]]
    scheme: Scheme
    group_size: int | None
    num_bits: int = 4
    symmetric: bool = True
    mixed_groups: Literal["", "alike", "by layer"] = ""
    floats: tuple[str, ...] = ()
    """Layers that stay as they are."""


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": True}
DYNAMIC = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
W8A8 = {"num_bits": 8, "strategy": "channel"}
LAYOUTS = {
    "gptq": Layout(GPTQ, lambda c: gptq(c, 4, 1), Scheme("gptq", 4, 16, True, zeros_less_one=True), 16),
    "gptq, asymmetric": Layout(
        GPTQ | {"sym": False, "checkpoint_format": "gptq"},
        lambda c: gptq(c, 4, 1),
        Scheme("gptq", 4, 16, True, zeros_less_one=True),
        16,
        symmetric=False,
    ),
    "gptq, second format": Layout(
        GPTQ | {"checkpoint_format": "gptq_v2", "group_size": 32},
        lambda c: gptq(c, 4, 0),
        Scheme("gptq", 4, 32, True),
        32,
        symmetric=False,
    ),
    "gptq, whole rows": Layout(
        GPTQ | {"group_size": -1}, lambda c: gptq(c, 4, 1), Scheme("gptq", 4, None, True, zeros_less_one=True), None
    ),
    "gptq, 8 bits": Layout(
        GPTQ | {"bits": 8}, lambda c: gptq(c, 8, 1), Scheme("gptq", 8, 16, True, zeros_less_one=True), 16, 8
    ),
    "gptq, 8 bits, whole rows": Layout(
        GPTQ | {"bits": 8, "group_size": -1},
        lambda c: gptq(c, 8, 1),
        Scheme("gptq", 8, None, True, zeros_less_one=True),
        None,
        8,
    ),
    "gptq, act-order": Layout(
        GPTQ | {"desc_act": True},
        lambda c: gptq(c, 4, 1),
        Scheme("gptq", 4, 16, True, zeros_less_one=True),
        16,
        mixed_groups="alike",
    ),
    "awq": Layout(
        {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True},
        awq,
        Scheme("awq", 4, 16, True),
        16,
        symmetric=False,
    ),
    "W4A16": Layout(
        compressed({"strategy": "group", "group_size": 32}), lambda c: packed(c, 4), Scheme("packed", 4, 32), 32
    ),
    "W4A16, asymmetric": Layout(
        compressed({"strategy": "group", "group_size": 32, "symmetric": False}),
        lambda c: packed(c, 4, zeros=True),
        Scheme("packed", 4, 32, True),
        32,
        symmetric=False,
    ),
    "W4A16, whole rows": Layout(compressed({"strategy": "channel"}), lambda c: packed(c, 4), Scheme("packed"), None),
    "W4A16, act-order": Layout(
        compressed({"strategy": "group", "group_size": 16, "actorder": "group"}),
        lambda c: packed(c, 4, groups=True),
        Scheme("packed", 4, 16, has_group_index=True),
        16,
        mixed_groups="by layer",
    ),
    "W8A16": Layout(
        compressed({"num_bits": 8, "strategy": "group", "group_size": 32}),
        lambda c: packed(c, 8),
        Scheme("packed", 8, 32),
        32,
        8,
    ),
    "W8A8": Layout(
        compressed(W8A8, "int-quantized", input_activations=DYNAMIC, ignore=["lm_head"]),
        int8,
        Scheme("int8", 8),
        None,
        8,
    ),
    "W8A8, some ignored": Layout(
        compressed(W8A8, "int-quantized", input_activations=DYNAMIC, ignore=["lm_head", "re:.*down_proj"]),
        int8,
        Scheme("int8", 8),
        None,
        8,
        floats=("down_proj",),
    ),
}


def make_codes(layout: Layout, shape: tuple[int, int], seed: int) -> Codes:
    generator = torch.Generator().manual_seed(seed)
    (num_rows, num_columns), middle = shape, 2 ** (layout.num_bits - 1)
    size = layout.group_size or num_columns
    num_groups = num_columns // size
    codes = torch.randint(1, 2 * middle, shape, generator=generator)
    codes[:, 0] = 2 * middle - 1
    groups = torch.arange(num_columns, dtype=torch.int32) // size
    if layout.mixed_groups:
        shared = torch.Generator().manual_seed(num_columns)
        order = torch.randperm(num_columns, generator=shared if layout.mixed_groups == "alike" else generator)
        groups = groups[order]
    zeros = torch.full((num_rows, num_groups), middle)
    if not layout.symmetric:
        zeros = torch.randint(0, 2 * middle, zeros.shape, generator=generator)
    scales = (0.5 + torch.rand(zeros.shape, generator=generator)) * 1.2 / (middle * num_columns**0.5)
    return Codes(codes, scales.to(torch.float16), zeros, groups)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_stands_for_exactly_the_weights_it_was_written_from(name: str) -> None:
    layout = LAYOUTS[name]
    codes = make_codes(layout, (48, 64), 1)
    stored = layout.write(codes)
    assert {f"m.{key}": tuple(tensor.shape) for key, tensor in stored.items()} == {
        key: shape for key, (shape, _) in layout.scheme.stored("m", (48, 64)).items()
    }
    part = unpack_weight(layout.scheme, stored)
    assert isinstance(part, ReorderedWeight if layout.mixed_groups else QuantizedWeight)
    assert torch.equal(part.dequantize(), codes.weight)


@dataclass(frozen=True)
class Twins:
    """The same model in codes, and in floats that stand for the same weights."""

    codes: Path
    floats: Path


@pytest.fixture
def twins(reference: Any, tmp_path: Path, request: pytest.FixtureRequest) -> Twins:
    layout = LAYOUTS[request.param]
    source, made = reference("qwen2").folder, Twins(tmp_path / "codes", tmp_path / "floats")
    plain = {name: tensor for file in source.glob("*.safetensors") for name, tensor in load_file(file).items()}
    in_codes, in_floats = dict(plain), dict(plain)
    for seed, name in enumerate(sorted(plain)):
        module = name.removesuffix(".weight")
        if module.endswith("_proj"):
            shape = [96 if size == 88 else size for size in plain[name].shape]  # groups must divide it
            codes = make_codes(layout, (shape[0], shape[1]), seed)
            in_floats[name] = in_codes[name] = codes.weight
            if not module.endswith(layout.floats or "-"):
                del in_codes[name]
                in_codes |= {f"{module}.{key}": tensor for key, tensor in layout.write(codes).items()}
    for folder, tensors in ((made.codes, in_codes), (made.floats, in_floats)):
        folder.mkdir()
        save_file(tensors, folder / "model.safetensors")
        shutil.copy(source / "config.json", folder)
        edit_config(folder, intermediate_size=96)
    edit_config(made.codes, quantization_config=layout.config)
    return made


def edit_config(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


CONFIG = EngineConfig(device="cpu", num_blocks=8)


def logits(folder: Path, config: EngineConfig = CONFIG) -> Tensor:
    return logits_of(folder, config, list(range(2, 50)))


@pytest.mark.parametrize("twins", [name for name in LAYOUTS if not name.startswith("W8A8")], indirect=True)
def test_a_model_of_codes_computes_what_its_floats_do(twins: Twins) -> None:
    difference = logits(twins.codes) - logits(twins.floats)
    assert difference.abs().max().item() < TOLERANCE


@pytest.mark.parametrize("twins", ["W8A8"], indirect=True)
def test_w8a8_is_what_rounding_its_floats_while_loading_gives(twins: Twins) -> None:
    """The same codes again, as every row reaches 127."""
    rounded = replace(CONFIG, quantization="int8", quantize_lm_head=False)
    assert torch.equal(logits(twins.codes), logits(twins.floats, rounded))


@pytest.mark.parametrize("twins", ["W8A8, some ignored"], indirect=True)
def test_ignored_layers_are_not_rounded(twins: Twins) -> None:
    exact, rounded = logits(twins.floats), logits(twins.floats, replace(CONFIG, quantization="int8"))
    error = (logits(twins.codes) - exact).abs().mean().item()
    assert 0 < error < 0.9 * (rounded - exact).abs().mean().item()


@pytest.mark.parametrize("twins", ["gptq"], indirect=True)
def test_biases_that_gptq_tools_add_must_be_zero(twins: Twins) -> None:
    file, name = twins.codes / "model.safetensors", "model.layers.1.self_attn.o_proj.bias"
    before, tensors = logits(twins.codes), load_file(file)
    save_file(tensors | {name: torch.zeros(64)}, file)
    assert torch.equal(logits(twins.codes), before)
    save_file(tensors | {name: torch.ones(64)}, file)
    with pytest.raises(CheckpointError, match=f"bias {name} is not zero"):
        logits(twins.codes)


@pytest.mark.parametrize("twins", ["gptq"], indirect=True)
def test_codes_of_another_shape_are_named(twins: Twins) -> None:
    edit_config(twins.codes, quantization_config=GPTQ | {"group_size": 32})
    with pytest.raises(CheckpointError, match=r"qzeros has shape \[4, 8\], config.json says \[2, 8\]"):
        logits(twins.codes)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "fp8"}, "quant_method: got 'fp8', must be gptq, awq"),
        (GPTQ | {"bits": 3}, "bits: got 3, must be 4 or 8"),
        (GPTQ | {"dynamic": {"-:.*": {}}}, "dynamic: got"),
        (GPTQ | {"checkpoint_format": "marlin"}, "checkpoint_format: got 'marlin'"),
        (LAYOUTS["awq"].config | {"version": "gemv"}, "version: got 'gemv', must be gemm"),
        (compressed(W8A8, "float-quantized", input_activations=DYNAMIC), "weights: got"),
        (compressed(W8A8 | {"type": "float"}, "int-quantized", input_activations=DYNAMIC), "num_bits: got 8, of type"),
        (compressed(W8A8, "int-quantized", input_activations=DYNAMIC | {"dynamic": False}), "input_activations: got"),
        (compressed(W8A8 | {"strategy": "tensor"}, "int-quantized"), "strategy: got 'tensor'"),
        (compressed({}, "naive-quantized"), "format: got 'naive-quantized'"),
        (compressed({}, sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config.format: got"),
        (compressed({}, transform_config={"config_groups": {"R1": {}}}), "transform_config: got"),
        ({"quant_method": "compressed-tensors"}, "config_groups: is missing"),
    ],
)
def test_formats_that_can_not_be_read_are_named(
    reference: Any, tmp_path: Path, config: dict[str, Any], words: str
) -> None:
    shutil.copy(reference("qwen2").folder / "config.json", tmp_path)
    edit_config(tmp_path, quantization_config=config)
    with pytest.raises(CheckpointError, match=re.escape(words)):
        ModelConfig.from_folder(tmp_path)
