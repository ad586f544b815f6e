"""Loading copies nothing that it need not: read from mapped files, packed layer by layer, given back."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from core.errors import CheckpointError
from engine.checkpoint import Checkpoint
from engine.tensor_files import TensorFiles

MIB = 2**20
VOCAB_SIZE, HIDDEN, NUM_EXPERTS, EXPERT_SIZE, DENSE_SIZE = 8192, 1024, 12, 1024, 4096
DENSE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN,
    "intermediate_size": DENSE_SIZE,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
EXPERTS = DENSE | {
    "architectures": ["MixtralForCausalLM"],
    "intermediate_size": EXPERT_SIZE,
    "num_hidden_layers": 1,
    "num_local_experts": NUM_EXPERTS,
    "num_experts_per_tok": 2,
}
NUM_BLOCKS = 64
CODE = """
import sys
from engine.config import EngineConfig
from engine.engine import Engine

def kib(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field))

before = kib("VmRSS")
config = EngineConfig(device="cpu", num_blocks=64, num_threads=1, quantization=sys.argv[2] if sys.argv[2:] else None)
engine = Engine.from_checkpoint(sys.argv[1], config)
print(kib("VmHWM") - before)
"""


def write(folder: Path, config: dict[str, Any]) -> tuple[int, int]:
    """A checkpoint in float32, all ones; returns how many weights its linear layers have, and its output matrix."""
    shapes: dict[str, tuple[int, ...]] = {"model.norm.weight": (HIDDEN,)}
    for layer in range(config["num_hidden_layers"]):
        prefix, size = f"model.layers.{layer}", config["intermediate_size"]
        shapes |= {f"{prefix}.{n}_layernorm.weight": (HIDDEN,) for n in ("input", "post_attention")}
        shapes |= {f"{prefix}.self_attn.{n}_proj.weight": (HIDDEN, HIDDEN) for n in "qkvo"}
        if config is DENSE:
            shapes |= {f"{prefix}.mlp.{n}_proj.weight": (size, HIDDEN) for n in ("gate", "up")}
            shapes[f"{prefix}.mlp.down_proj.weight"] = (HIDDEN, size)
        else:
            shapes[f"{prefix}.block_sparse_moe.gate.weight"] = (NUM_EXPERTS, HIDDEN)
            for expert in (f"{prefix}.block_sparse_moe.experts.{e}" for e in range(NUM_EXPERTS)):
                shapes |= {f"{expert}.{n}.weight": (size, HIDDEN) for n in ("w1", "w3")}
                shapes[f"{expert}.w2.weight"] = (HIDDEN, size)
    num_weights = sum(math.prod(shape) for shape in shapes.values())
    shapes["model.embed_tokens.weight"] = (VOCAB_SIZE, HIDDEN)
    save_file({name: torch.ones(shape) for name, shape in shapes.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return num_weights, VOCAB_SIZE * HIDDEN


@pytest.mark.parametrize(
    ("config", "quantization", "item_bytes"), [(DENSE, (), 4), (DENSE, ("int8",), 1), (EXPERTS, ("int8",), 1)]
)
def test_peak_memory_is_that_of_weights_and_kv(
    tmp_path: Path, config: dict[str, Any], quantization: tuple[str, ...], item_bytes: int
) -> None:
    """Above what Python and torch take. The files have about 190 MiB, of which any copy would go beyond the limit."""
    expected = sum(write(tmp_path, config)) * item_bytes
    expected += NUM_BLOCKS * 16 * 2 * HIDDEN * 4 * config["num_hidden_layers"]
    command = [sys.executable, "-c", CODE, str(tmp_path), *quantization]
    taken = 1024 * int(subprocess.run(command, capture_output=True, check=True, timeout=100).stdout)
    assert expected < taken < expected + 90 * MIB


def test_a_tensor_that_is_not_aligned_is_read(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    header += b" " * (5 - len(header) % 8)
    data = torch.tensor([1.5, -2.0]).numpy().tobytes()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + data)
    assert TensorFiles(Checkpoint.open(tmp_path)).read("a").tolist() == [1.5, -2.0]


def test_what_is_given_back_is_read_again(tmp_path: Path) -> None:
    save_file({"a": torch.arange(5000.0)}, tmp_path / "model.safetensors")
    files = TensorFiles(Checkpoint.open(tmp_path))
    tensor = files.read("a")
    before = tensor.sum().item()
    files.release_pages()
    assert tensor.sum().item() == before


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    files = TensorFiles(Checkpoint.open(tmp_path))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model.safetensors: can't be mapped into memory .*copy the file again"):
        files.read("a")
