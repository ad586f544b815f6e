"""Frequencies and factors of every rotary scaling against those of transformers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from engine.model_config import ModelConfig
from engine.rotary import inverse_frequencies

SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "partial": {"rope_type": "default", "partial_rotary_factor": 0.5},
    "linear": {"rope_type": "linear", "factor": 3.0},
    "llama3": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0},
    "yarn, with its factor": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.7},
    "yarn, not truncated": {
        "rope_type": "yarn",
        "factor": 40.0,
        "truncate": False,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
    },
    "yarn, two scales": {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.707},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1 + i / 10 for i in range(16)],
        "long_factor": [1 + i for i in range(16)],
    },
}
STRETCHED = ("llama3", "yarn", "longrope")


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("original", [64, 1024])
def test_frequencies_are_those_of_transformers(name: str, original: int, tmp_path: Path) -> None:
    """At the longest context that is served, 1024 tokens."""
    from transformers import LlamaConfig, Phi3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {"rope_theta": 5e4} | SCALINGS[name]
    if scaling["rope_type"] in STRETCHED:
        scaling["original_max_position_embeddings"] = original
    kind: Any = LlamaConfig if name not in ("partial", "longrope") else Phi3Config
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "max_position_embeddings": 1024}
    more = {"original_max_position_embeddings": original} if kind is Phi3Config else {}
    config = kind(**sizes, **more, rope_parameters=scaling, architectures=[kind.__name__[:-6] + "ForCausalLM"])
    config.save_pretrained(tmp_path)
    rope = ModelConfig.from_folder(tmp_path).layers[0].rope
    if scaling["rope_type"] == "default":
        expected, factor = 1.0 / 5e4 ** (torch.arange(0, rope.size, 2) / rope.size), 1.0
    else:
        expected, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"), seq_len=1024)
    assert rope.size == (16 if name == "partial" else 32)
    torch.testing.assert_close(inverse_frequencies(rope, 1024), expected, rtol=1e-6, atol=0)
    assert rope.attention_factor == pytest.approx(factor)


def test_longrope_goes_by_what_the_engine_serves(tmp_path: Path) -> None:
    from transformers import Phi3Config

    config: Any = Phi3Config
    scaling = SCALINGS["longrope"] | {"rope_theta": 1e4}
    sizes = {"hidden_size": 128, "num_attention_heads": 4, "original_max_position_embeddings": 64}
    config(**sizes, rope_parameters=scaling, architectures=["Phi3ForCausalLM"]).save_pretrained(tmp_path)
    rope = ModelConfig.from_folder(tmp_path).layers[0].rope
    short, long = (torch.tensor(scaling[f"{n}_factor"]) for n in ("short", "long"))
    torch.testing.assert_close(inverse_frequencies(rope, 64) * short, inverse_frequencies(rope, 65) * long)
