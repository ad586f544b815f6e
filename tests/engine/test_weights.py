"""Checkpoint files that are missing, damaged, or of another model: one clear error each, before anything is loaded."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.errors import CheckpointError
from engine.checkpoint import Checkpoint
from engine.model_config import ModelConfig
from engine.weights import HeadsWeights, Storage, load_weights

FLOAT32 = Storage("float32", "float32", torch.float32, torch.device("cpu"))
Edit = Callable[[dict[str, torch.Tensor]], object]


@pytest.fixture
def folder(reference: Any, tmp_path: Path) -> Path:
    """A copy of a single-file checkpoint, to be damaged."""
    return Path(shutil.copytree(reference("llama").folder, tmp_path / "llama"))


@pytest.fixture
def sharded(reference: Any, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(reference("qwen2").folder, tmp_path / "qwen2"))
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


def load(folder: Path) -> None:
    load_weights(folder, ModelConfig.from_folder(folder), FLOAT32)


def edit(file: Path, change: Edit) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_stacked_parts_keep_their_order(reference: Any) -> None:
    made = reference("qwen3_moe")
    weights = load_weights(made.folder, ModelConfig.from_folder(made.folder), FLOAT32)
    theirs = {name: tensor.cpu() for name, tensor in made.model.state_dict().items()}
    attention, prefix = weights.layers[2].attention, "model.layers.2.self_attn"
    assert isinstance(attention, HeadsWeights)
    columns = attention.qkv(torch.eye(attention.qkv.in_features))
    torch.testing.assert_close(columns.t(), torch.cat([theirs[f"{prefix}.{n}_proj.weight"] for n in "qkv"]))


@pytest.mark.parametrize("variant", ["qwen3", "llama"])
def test_the_embedding_is_not_copied(reference: Any, variant: str) -> None:
    """Tied or not, it lies in the mapped file, which holds nothing of it in memory until it is read."""
    folder = reference(variant).folder
    weights = load_weights(folder, ModelConfig.from_folder(folder), FLOAT32)
    maps = Path("/proc/self/maps").read_text().splitlines()
    ranges = [[int(end, 16) for end in line.split()[0].split("-")] for line in maps if str(folder) in line]
    assert any(start <= weights.embedding.data_ptr() < end for start, end in ranges)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), "tensor model.layers.1.mlp.up_proj.weight"),
        (lambda t: t.pop("lm_head.weight"), "tensor lm_head.weight [211, 64] of LlamaForCausalLM is missing"),
        (lambda t: t.update({"model.norm.weight": torch.ones(63)}), "tensor model.norm.weight has shape [63]"),
        (lambda t: t.update({"model.extra": torch.ones(3)}), "tensor model.extra [3] is no part of LlamaForCausalLM"),
        (lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.float64)}), "is of type F64"),
    ],
)
def test_wrong_tensors_are_named(folder: Path, change: Edit, words: str) -> None:
    edit(folder / "model.safetensors", change)
    with pytest.raises(CheckpointError) as error:
        load(folder)
    assert str(folder) in str(error.value)
    assert words in str(error.value)


def test_tensors_that_are_computed_or_tied_may_be_there(folder: Path) -> None:
    edit_json(folder / "config.json", tie_word_embeddings=True)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(12)}
    edit(folder / "model.safetensors", lambda t: t.update(extra))
    load(folder)


@pytest.mark.parametrize("num_bytes", [0, 4, 200, 20_000, -1])
def test_a_truncated_file_is_named(folder: Path, num_bytes: int) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:num_bytes])
    with pytest.raises(CheckpointError, match=f"{file}: .*copy the file again") as error:
        load(folder)
    assert (" is truncated: " in str(error.value)) == (num_bytes in (20_000, -1))


def test_a_header_that_lies_about_offsets_is_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    start = data.index(b'"data_offsets":[') + len(b'"data_offsets":[')
    file.write_bytes(data[:start] + b"9" + data[start + 1 :])
    with pytest.raises(CheckpointError, match="no valid safetensors header"):
        load(folder)


def test_no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"holds neither model.safetensors nor .* must be converted"):
        load(folder)


def test_a_missing_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard}: no such file, though the index names it"):
        load(sharded)


def test_a_shard_without_its_tensor_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    name = next(iter(load_file(shard)))
    edit(shard, lambda tensors: tensors.pop(name))
    with pytest.raises(CheckpointError, match=f"{shard}: tensor {name} is not in it"):
        load(sharded)


@pytest.mark.parametrize("weight_map", [None, {}, {"a": "../model.safetensors"}, {"a": 3}])
def test_a_malformed_index_is_refused(sharded: Path, weight_map: object) -> None:
    edit_json(sharded / "model.safetensors.index.json", weight_map=weight_map)
    with pytest.raises(CheckpointError, match=r"model.safetensors.index.json: "):
        load(sharded)


def test_a_config_of_another_size_is_refused(folder: Path) -> None:
    edit_json(folder / "config.json", intermediate_size=100)
    with pytest.raises(CheckpointError, match=r"has shape \[88, 64\], config.json says \[100, 64\]"):
        load(folder)


def test_a_config_with_more_layers_is_refused(folder: Path) -> None:
    edit_json(folder / "config.json", num_hidden_layers=3)
    with pytest.raises(CheckpointError, match=r"tensor model.layers.2.* is missing"):
        load(folder)


def test_a_config_with_fewer_layers_is_refused(folder: Path) -> None:
    edit_json(folder / "config.json", num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"tensor model.layers.1.* is no part of"):
        load(folder)


def test_a_fingerprint_is_stable(folder: Path, tmp_path: Path) -> None:
    before = Checkpoint.open(folder).fingerprint()
    copy = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    values = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(dict(reversed(values.items()))))
    assert Checkpoint.open(copy).fingerprint() == before
    assert len(before) == 32


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t["model.norm.weight"].mul_(1.001),
        lambda t: t["model.layers.1.mlp.up_proj.weight"].view(-1)[-1].add_(1),
    ],
)
def test_a_fingerprint_tells_weights_apart(folder: Path, change: Edit) -> None:
    before = Checkpoint.open(folder).fingerprint()
    edit(folder / "model.safetensors", change)
    assert Checkpoint.open(folder).fingerprint() != before


def test_a_fingerprint_tells_configurations_apart(folder: Path) -> None:
    before = Checkpoint.open(folder).fingerprint()
    edit_json(folder / "config.json", rms_norm_eps=1e-3)
    assert Checkpoint.open(folder).fingerprint() != before


def test_a_large_checkpoint_is_sampled_tensor_by_tensor(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.checkpoint._HASHED_WHOLE_BYTES", 1000)
    before = Checkpoint.open(folder).fingerprint()
    edit(folder / "model.safetensors", lambda t: t["model.layers.0.mlp.down_proj.weight"].mul_(1.01))
    assert Checkpoint.open(folder).fingerprint() != before


def test_reading_descriptions_takes_no_torch() -> None:
    code = "import sys, engine.model_config, engine.parameters, engine.checkpoint; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
