"""The engine: everything that turns requests into tokens on one device, put together."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch

from core.errors import ConfigError
from core.kv_layout import KVLayout
from engine.block_pool import BlockPool
from engine.checkpoint import Checkpoint
from engine.config import PRECISIONS, EngineConfig
from engine.grammar import GrammarMasks
from engine.kv_storage import KVStorage
from engine.memory import num_blocks_that_fit
from engine.model import Model
from engine.model_config import Dtype, ModelConfig
from engine.plan import StepOutput
from engine.prefix_index import PrefixIndex
from engine.runner import Runner
from engine.scheduler import Scheduler
from engine.speculation.methods import make_speculator
from engine.weights import Storage, load_weights
from kernels.threads import set_num_threads


@dataclass(frozen=True, slots=True)
class Engine:
    """A step is `scheduler.schedule()`, `runner.run(plan)`, `scheduler.update(plan, result)`; `step()` does all three.

    `max_model_len` is the least of the model's length, the configured one, and what all blocks together hold.
    """

    model_config: ModelConfig
    layout: KVLayout
    pool: BlockPool
    scheduler: Scheduler
    model: Model
    runner: Runner
    storage: KVStorage
    max_model_len: int

    @classmethod
    def from_checkpoint(cls, path: str | Path, config: EngineConfig, cpus: Sequence[int] = ()) -> Self:
        """Load a checkpoint folder and take memory for the KV cache.

        Raises `CheckpointError` for a folder that can't be served, and `ConfigError` for a configuration that asks too
        much of it or of this machine. `num_threads` holds for the whole process; its threads are pinned to `cpus`.
        """
        model_config = ModelConfig.from_folder(path)
        latent = model_config.latent
        limit = model_config.max_model_len(config.max_model_len)
        device = _device(config)
        own_dtype = "float32" if device.type == "cpu" else model_config.dtype
        dtype = own_dtype if config.dtype == "auto" else config.dtype
        set_num_threads(config.num_threads or len(os.sched_getaffinity(0)), cpus)
        layout = KVLayout(
            model=Path(path).resolve().name,
            fingerprint=Checkpoint.open(path).fingerprint(),
            num_layers=model_config.num_layers,
            num_kv_heads=model_config.num_kv_heads if latent is None else 1,
            head_size=model_config.head_size if latent is None else latent.kv_rank + latent.rope_size,
            block_size=config.block_size,
            dtype=dtype if config.kv_cache_dtype == "auto" else config.kv_cache_dtype,
            kind="heads" if latent is None else "latent",
        )
        weights_in = _storage(config, dtype, device)
        model = Model(model_config, load_weights(path, model_config, weights_in), weights_in, limit)
        num_blocks = config.num_blocks or num_blocks_that_fit(model, layout, config, device, limit)
        index = PrefixIndex(layout.contents, config.block_size) if config.enable_prefix_caching else None
        pool = BlockPool(num_blocks, config.block_size, index)
        storage = KVStorage(layout, num_blocks, device)
        max_model_len = min(limit, num_blocks * config.block_size)
        scheduler = Scheduler(
            pool,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_num_seqs=config.max_num_seqs,
            max_model_len=max_model_len,
            speculator=make_speculator(config.speculative_config),
        )
        grammars = GrammarMasks.from_checkpoint(Path(path), model_config.vocab_size, model_config.eos_token_ids)
        runner = Runner(model, storage, grammars)
        return cls(model_config, layout, pool, scheduler, model, runner, storage, max_model_len)

    def step(self, on_layer: Callable[[int], None] | None = None) -> list[StepOutput]:
        """Schedule, run, and update once. Empty where there is nothing to do, or no prompt came to its end."""
        plan = self.scheduler.schedule()
        if not plan:
            return []
        try:
            result = self.runner.run(plan, on_layer)
        except BaseException:
            self.scheduler.abandon(plan)
            raise
        return self.scheduler.update(plan, result)


def _storage(config: EngineConfig, dtype: Dtype, device: torch.device) -> Storage:
    """On CPU all computing is in float32, whatever weights are held in."""
    quantized = None if config.quantization is None else PRECISIONS[config.quantization]
    return Storage(
        precision=quantized or dtype,
        head_precision="int8" if quantized is not None and config.quantize_lm_head else dtype,
        dtype=torch.float32 if device.type == "cpu" else getattr(torch, dtype),
        device=device,
    )


def _device(config: EngineConfig) -> torch.device:
    if config.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("engine.device", "cuda", "but torch sees no GPU here; use 'cpu' or 'auto'")
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(config.device)
