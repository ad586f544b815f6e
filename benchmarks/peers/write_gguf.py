"""Writes a float32 checkpoint of Llama or Qwen3-MoE as GGUF, matrices in Q8_0: write_gguf.py MODEL_FOLDER OUTPUT.gguf

Needs the packages gguf and safetensors. The tokenizer stays behind: the benchmark speaks in token ids.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file

Array = npt.NDArray[np.float32]
ARCHITECTURES = {"llama": "llama", "qwen3_moe": "qwen3moe"}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}
PAIRED = ("self_attn.q_proj", "self_attn.k_proj")
"""GGUF's llama turns neighbouring elements of a head, the checkpoint the two halves of it."""


def write_gguf(source: Path, target: Path) -> None:
    """Raises `KeyError` for another family."""
    config = json.loads((source / "config.json").read_text())
    writer = gguf.GGUFWriter(str(target), ARCHITECTURES[config["model_type"]])
    _write_config(writer, config)
    weights: dict[str, Array] = {}
    for path in sorted(source.glob("*.safetensors")):
        weights |= load_file(path)
    for name, weight in _tensors(weights, config):
        if weight.ndim == 1 or "ffn_gate_inp" in name:
            writer.add_tensor(name, weight.astype(np.float32))
        else:
            q8_0 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(weight.astype(np.float32), q8_0), raw_dtype=q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_config(writer: Any, config: dict[str, Any]) -> None:
    head_size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rope = config.get("rope_parameters") or config
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if num_experts := _num_experts(config):
        writer.add_expert_count(num_experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


def _tensors(weights: dict[str, Array], config: dict[str, Any]) -> Iterator[tuple[str, Array]]:
    """Under GGUF's names; the experts of a layer as one tensor."""
    yield "token_embd.weight", weights["model.embed_tokens.weight"]
    yield "output_norm.weight", weights["model.norm.weight"]
    if not config["tie_word_embeddings"]:
        yield "output.weight", weights["lm_head.weight"]
    num_experts = _num_experts(config)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for theirs, name in LAYER_NAMES.items():
            weight = weights.get(f"{prefix}{theirs}.weight")
            if weight is not None:
                heads = config["num_attention_heads" if "q_proj" in theirs else "num_key_value_heads"]
                paired = theirs in PAIRED and config["model_type"] == "llama"
                yield f"blk.{layer}.{name}.weight", _paired(weight, heads) if paired else weight
        for part in ("gate", "up", "down") if num_experts else ():
            experts = [weights[f"{prefix}mlp.experts.{e}.{part}_proj.weight"] for e in range(num_experts)]
            yield f"blk.{layer}.ffn_{part}_exps.weight", np.stack(experts)


def _num_experts(config: dict[str, Any]) -> int:
    """0 for a dense model."""
    return int(config.get("num_local_experts") or config.get("num_experts") or 0)


def _paired(weight: Array, num_heads: int) -> Array:
    """Rows of each head: element i and i + D/2 become neighbours."""
    halves = weight.reshape(num_heads, 2, -1, weight.shape[1])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(weight.shape)


if __name__ == "__main__":
    write_gguf(Path(sys.argv[1]), Path(sys.argv[2]))
