"""The checkpoints that peers are given hold the same weights as ours, in their own layouts."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.int8_checkpoint import write_int8_checkpoint


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    names = {
        "model.embed_tokens.weight": (12, 8),
        "model.layers.0.self_attn.q_proj.weight": (6, 8),
        "model.layers.0.self_attn.q_norm.weight": (8,),
        "model.layers.0.mlp.gate.weight": (4, 8),
        "model.layers.0.mlp.experts.3.up_proj.weight": (16, 8),
        "lm_head.weight": (12, 8),
    }
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in names.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "qwen3_moe"}')
    (folder / "tokenizer.json").write_text("{}")
    return folder


@pytest.mark.parametrize("quantize_experts", [True, False])
def test_linears_become_codes_and_everything_else_stays(source: Path, tmp_path: Path, quantize_experts: bool) -> None:
    write_int8_checkpoint(source, tmp_path / "out", quantize_experts=quantize_experts)
    before, after = (load_file(folder / "model.safetensors") for folder in (source, tmp_path / "out"))
    linears = {"model.layers.0.self_attn.q_proj.weight"}
    if quantize_experts:
        linears.add("model.layers.0.mlp.experts.3.up_proj.weight")
    assert {name for name, tensor in after.items() if tensor.dtype == torch.int8} == linears
    assert after.keys() == before.keys() | {f"{name}_scale" for name in linears}
    for name, tensor in before.items():
        if name in linears:
            scale = after[f"{name}_scale"]
            assert scale.shape == (tensor.shape[0], 1)
            assert bool(((after[name] * scale - tensor).abs() <= 0.5001 * scale).all())
        else:
            assert torch.equal(after[name], tensor)


def test_the_config_tells_how_to_read_the_codes(source: Path, tmp_path: Path) -> None:
    write_int8_checkpoint(source, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    quantization = config["quantization_config"]
    assert (config["model_type"], quantization["quant_method"]) == ("qwen3_moe", "compressed-tensors")
    group = quantization["config_groups"]["group_0"]
    assert (group["weights"]["strategy"], group["input_activations"]["strategy"]) == ("channel", "token")
    assert (tmp_path / "out" / "tokenizer.json").exists()
