"""gpt-oss's experts in MXFP4: values by the table of the format, and a model of them beside one of floats."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from core.errors import CheckpointError
from engine.config import EngineConfig
from engine.packed_weights import unpack_weight
from engine.quantization import Scheme
from tests.engine.model_logits import logits_of

VALUES = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)
NUM_EXPERTS, HIDDEN, SIZE = 5, 64, 96


def write(num_rows: int, num_columns: int, rng: random.Random) -> tuple[Tensor, Tensor, Tensor]:
    """Blocks [N, G, 16], exponents [N, G], and the weight [N, K] that they stand for."""
    groups = range(num_columns // 32)
    nibbles = [[[rng.randrange(16) for _ in range(32)] for _ in groups] for _ in range(num_rows)]
    exponents = [[rng.randrange(123, 126) for _ in groups] for _ in range(num_rows)]
    blocks = [[[group[i] | group[i + 1] << 4 for i in range(0, 32, 2)] for group in row] for row in nibbles]
    weight = [
        [VALUES[n] * 2.0 ** (e - 127) for group, e in zip(row, powers, strict=True) for n in group]
        for row, powers in zip(nibbles, exponents, strict=True)
    ]
    return (
        torch.tensor(blocks, dtype=torch.uint8),
        torch.tensor(exponents, dtype=torch.uint8),
        torch.tensor(weight, dtype=torch.float32),
    )


def test_blocks_are_read_exactly() -> None:
    blocks, scales, weight = write(48, 64, random.Random(0))
    part = unpack_weight(Scheme("mxfp4", 4, 32), {"blocks": blocks, "scales": scales})
    assert isinstance(part, Tensor)
    assert torch.equal(part.float(), weight)


@pytest.fixture
def folders(reference: Any, tmp_path: Path) -> tuple[Path, Path]:
    """The same model with experts in blocks, and in floats."""
    source, rng = reference("gpt_oss").folder, random.Random(1)
    in_blocks = load_file(source / "model.safetensors")
    for name in [name for name in in_blocks if ".experts." in name]:
        del in_blocks[name]
    in_floats = dict(in_blocks)
    for layer in range(2):
        for name, num_rows, num_columns in (("gate_up_proj", 2 * SIZE, HIDDEN), ("down_proj", HIDDEN, SIZE)):
            at = f"model.layers.{layer}.mlp.experts.{name}"
            written = [write(num_rows, num_columns, rng) for _ in range(NUM_EXPERTS)]
            blocks, scales, weights = (torch.stack(each) for each in zip(*written, strict=True))
            bias = {f"{at}_bias": torch.linspace(-1, 1, NUM_EXPERTS * num_rows).view(NUM_EXPERTS, -1)}
            in_blocks |= {f"{at}_blocks": blocks, f"{at}_scales": scales} | bias
            in_floats |= {at: weights.transpose(1, 2).contiguous()} | bias
    config = json.loads((source / "config.json").read_text()) | {"intermediate_size": SIZE}
    quantized = {"quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}}
    for folder, tensors, changes in (("blocks", in_blocks, quantized), ("floats", in_floats, {})):
        (tmp_path / folder).mkdir()
        save_file(tensors, tmp_path / folder / "model.safetensors")
        (tmp_path / folder / "config.json").write_text(json.dumps(config | changes))
    return tmp_path / "blocks", tmp_path / "floats"


CONFIG = EngineConfig(device="cpu", num_blocks=8)


def logits(folder: Path, config: EngineConfig = CONFIG) -> Tensor:
    return logits_of(folder, config, list(range(2, 50)))


def test_a_model_with_experts_in_blocks_computes_what_its_floats_do(folders: tuple[Path, Path]) -> None:
    assert torch.equal(*map(logits, folders))


def test_missing_scales_are_named(folders: tuple[Path, Path]) -> None:
    file = folders[0] / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.mlp.experts.down_proj_scales"]
    save_file(tensors, file)
    with pytest.raises(CheckpointError, match=r"tensor model.layers.1.mlp.experts.down_proj_scales \[5, 64, 3\]"):
        logits(folders[0])
