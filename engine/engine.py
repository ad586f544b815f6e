"""The engine: everything that turns requests into tokens on one device, put together."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from core.kv_layout import KVLayout
from core.sampling import SamplingParams
from engine.block_pool import BlockPool
from engine.config import EngineConfig
from engine.grammar import GrammarMasks
from engine.growth import GrowthForecast
from engine.kv_storage import HostKV, KVStorage
from engine.loading import load_model
from engine.memory import num_blocks_that_fit, num_host_blocks
from engine.model import Model
from engine.model_config import ModelConfig
from engine.plan import Plan, PlanEntry, StepOutput
from engine.prefix_index import PrefixIndex
from engine.runner import Runner
from engine.scheduler import Scheduler
from engine.speculation.methods import load_draft_model, make_speculator
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
        set_num_threads(config.num_threads or len(os.sched_getaffinity(0)), cpus)
        loaded = load_model(path, config)
        draft = load_draft_model(config, loaded.config.vocab_size)
        num_blocks = config.num_blocks or num_blocks_that_fit(loaded, draft, config)
        index = PrefixIndex(loaded.layout.contents, config.block_size) if config.enable_prefix_caching else None
        pool = BlockPool(num_blocks, config.block_size, index)
        storage = KVStorage(loaded.layout, num_blocks, loaded.device)
        max_model_len = min(loaded.max_model_len, num_blocks * config.block_size)
        host = HostKV(storage, num_host_blocks(loaded.layout, num_blocks, max_model_len, config))
        scheduler = Scheduler(
            pool,
            max_num_batched_tokens=config.max_num_batched_tokens,
            max_num_seqs=config.max_num_seqs,
            max_model_len=max_model_len,
            speculator=make_speculator(config, draft, num_blocks),
            forecast=GrowthForecast(config.block_size, max_model_len),
            num_host_blocks=host.num_blocks,
        )
        model_config, model = loaded.config, loaded.model
        grammars = GrammarMasks.from_checkpoint(Path(path), model_config.vocab_size, model_config.eos_token_ids)
        runner = Runner(model, storage, grammars, host)
        return cls(model_config, loaded.layout, pool, scheduler, model, runner, storage, max_model_len)

    def warm_up(self) -> None:
        """Run a step in a block that nobody holds: the first one of a process takes many times as long as others.

        Only before the first request.
        """
        token_ids = (0,) * self.layout.block_size
        self.runner.run(Plan((PlanEntry("warm-up", token_ids, 0, (0,), SamplingParams(max_tokens=1)),)))

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
