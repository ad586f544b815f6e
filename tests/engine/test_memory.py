"""What is left for the KV cache on a GPU, with the GPU's answers made up."""

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.kv_storage import KVStorage
from engine.memory import _free_bytes, _largest_plan
from engine.model import Model
from engine.model_config import ModelConfig
from engine.weights import Storage, load_weights


def test_the_largest_plan_is_as_large_as_a_step_can_be() -> None:
    plan, num_blocks = _largest_plan(EngineConfig(max_num_seqs=8, max_num_batched_tokens=100), max_model_len=64)
    assert sum(entry.sampling is not None for entry in plan.entries) == 8
    assert max(entry.num_tokens for entry in plan.entries) == 64
    used = [block for entry in plan.entries for block in entry.block_ids]
    assert sorted(used) == list(range(num_blocks))


def test_weights_others_and_activations_are_taken_off(reference: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1000 bytes at 90 %, 300 are taken already and a step takes 50 for a while."""
    folder: Path = reference("qwen3").folder
    cpu, config = torch.device("cpu"), EngineConfig(num_blocks=8, device="cpu")
    layout = Engine.from_checkpoint(folder, config).layout
    model_config = ModelConfig.from_folder(folder)
    storage = Storage("float32", "float32", torch.float32, cpu)
    model = Model(model_config, load_weights(folder, model_config, storage), storage, 256)
    left: list[KVStorage] = []

    def empty_cache() -> None:
        left.extend(each for each in gc.get_objects() if type(each) is KVStorage and each.num_blocks == 80)

    answers: dict[str, Any] = {
        "reset_peak_memory_stats": None,
        "memory_allocated": 400,
        "max_memory_allocated": 450,
        "mem_get_info": (700, 1000),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "empty_cache", empty_cache)
    assert _free_bytes(model, layout, config, cpu, max_model_len=256) == 900 - 300 - 50
    assert left == []
