"""Writes a checkpoint's weights anew as W8A8 in the compressed-tensors layout, which vLLM reads.

Every linear but the router of a mixture of experts and the output matrix, which vLLM wants as they are: weights int8
with a float32 scale for each output channel, activations int8 with a scale for each token, taken when they come.
Symmetric, both of them.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

IGNORED = ("lm_head", r"re:.*mlp\.gate$")
EXPERTS = r"re:.*mlp\.experts.*"
_SCHEME = {"num_bits": 8, "type": "int", "symmetric": True}
_GROUP = {
    "targets": ["Linear"],
    "weights": {**_SCHEME, "strategy": "channel", "dynamic": False},
    "input_activations": {**_SCHEME, "strategy": "token", "dynamic": True},
}


def write_int8_checkpoint(source: Path, target: Path, *, quantize_experts: bool = True) -> None:
    """`target` is made, or written over. The source's weights must be safetensors files."""
    target.mkdir(parents=True, exist_ok=True)
    ignored = IGNORED if quantize_experts else (*IGNORED, EXPERTS)
    index: dict[str, str] = {}
    for path in source.iterdir():
        if path.suffix == ".safetensors":
            tensors = quantized(load_file(path), ignored)
            index |= dict.fromkeys(tensors, path.name)
            save_file(tensors, target / path.name, metadata={"format": "pt"})
        elif path.name not in ("config.json", "model.safetensors.index.json"):
            shutil.copy(path, target / path.name)
    if len(set(index.values())) > 1:
        (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "ignore": list(ignored),
        "config_groups": {"group_0": _GROUP},
    }
    config = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "quantization_config": quantization}, indent=2))


def quantized(tensors: Mapping[str, Tensor], ignored: Sequence[str]) -> dict[str, Tensor]:
    """Matrices of linears as codes [N, K] int8 and scales [N, 1] float32; everything else as it is."""
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.dim() == 2 and not _is_kept(name, ignored):
            wide = tensor.to(torch.float32)
            scales = wide.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny) / 127
            result[name] = (wide / scales).round().clamp(-127, 127).to(torch.int8)
            result[f"{name}_scale"] = scales
        else:
            result[name] = tensor
    return result


def _is_kept(name: str, ignored: Sequence[str]) -> bool:
    """Embeddings, and modules that `ignored` names, outright or after "re:" by a pattern."""
    module = name.removesuffix(".weight")
    patterns = [each.removeprefix("re:") if each.startswith("re:") else re.escape(each) for each in ignored]
    return module.endswith("embed_tokens") or any(re.fullmatch(pattern, module) for pattern in patterns)
