"""Logits of a checkpoint, past scheduler and sampler."""

from pathlib import Path

import torch

from engine.config import EngineConfig
from engine.engine import Engine
from engine.plan import Plan, PlanEntry
from engine.step_inputs import build_step_inputs


@torch.inference_mode()
def logits_of(folder: Path, config: EngineConfig, token_ids: list[int]) -> torch.Tensor:
    """[T, V] float32 on CPU, of all tokens in one step."""
    engine = Engine.from_checkpoint(folder, config)
    block_size, vocab_size = engine.layout.block_size, engine.model_config.vocab_size
    blocks = tuple(range(-(-len(token_ids) // block_size)))
    plan = Plan((PlanEntry("a", tuple(token_ids), 0, blocks, None),))
    inputs = build_step_inputs(plan, block_size, vocab_size, engine.storage.device)
    return engine.model.logits(engine.model.forward(inputs, engine.storage.layers)).cpu()
