"""Loading copies nothing that it need not: read from mapped files, packed layer by layer, given back."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from core.errors import CheckpointError
from engine.checkpoint import Checkpoint
from engine.tensor_files import TensorFiles

MIB = 2**20
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}
NUM_LAYER_WEIGHTS = 2 * (4 * 1024 * 1024 + 3 * 1024 * 4096)
NUM_HEAD_WEIGHTS = 8192 * 1024
KV_BYTES = 64 * 16 * 2 * 1024 * 4 * 2
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


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """192 MiB of float32."""
    folder, one = tmp_path_factory.mktemp("large"), torch.ones(1)
    tensors = {"model.embed_tokens.weight": one.expand(8192, 1024), "model.norm.weight": one.expand(1024)}
    for layer in range(2):
        prefix = f"model.layers.{layer}"
        tensors |= {f"{prefix}.self_attn.{n}_proj.weight": one.expand(1024, 1024) for n in "qkvo"}
        tensors |= {f"{prefix}.mlp.{n}_proj.weight": one.expand(4096, 1024) for n in ("gate", "up")}
        tensors[f"{prefix}.mlp.down_proj.weight"] = one.expand(1024, 4096)
        tensors |= {f"{prefix}.{n}_layernorm.weight": one.expand(1024) for n in ("input", "post_attention")}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


@pytest.mark.parametrize(("quantization", "item_bytes"), [((), 4), (("int8",), 1), (("int4",), 0.5)])
def test_peak_memory_is_that_of_weights_and_kv(folder: Path, quantization: tuple[str, ...], item_bytes: float) -> None:
    """Above what Python and torch take: a copy of the file's 192 MiB anywhere would go beyond the limit."""
    command = [sys.executable, "-c", CODE, str(folder), *quantization]
    taken = 1024 * int(subprocess.run(command, capture_output=True, check=True, timeout=100).stdout)
    weights = NUM_LAYER_WEIGHTS * item_bytes + NUM_HEAD_WEIGHTS * max(item_bytes, 1)
    assert weights + KV_BYTES < taken < weights + KV_BYTES + 120 * MIB


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
