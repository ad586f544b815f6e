"""How many KV blocks fit into memory."""

from __future__ import annotations

import torch

from core.errors import ConfigError
from core.kv_layout import KVLayout
from core.sampling import SamplingParams
from engine.config import EngineConfig
from engine.kv_storage import KVStorage
from engine.loading import LoadedModel
from engine.model import Model
from engine.plan import Plan, PlanEntry
from engine.runner import Runner
from kernels.paged_attention import MAX_GATHERED_BYTES


def num_blocks_that_fit(loaded: LoadedModel, draft: LoadedModel | None, config: EngineConfig) -> int:
    """At most as many as `max_num_seqs` requests of full length can use; `ConfigError` where none fits.

    `draft` needs as many blocks of its own.
    """
    layout, max_model_len = loaded.layout, loaded.max_model_len
    block_bytes = layout.bytes_per_block + (0 if draft is None else draft.layout.bytes_per_block)
    usable = config.max_num_seqs * -(-max_model_len // config.block_size)
    if loaded.device.type == "cpu":
        num_bytes = int(config.kv_cache_memory_gib * 2**30)
        path, value = "engine.kv_cache_memory_gib", config.kv_cache_memory_gib
    else:
        gathered = max(MAX_GATHERED_BYTES["cuda"], max_model_len * layout.bytes_per_token_per_layer)
        num_bytes = _free_bytes(loaded.model, layout, config, loaded.device, max_model_len) - gathered
        path, value = "engine.gpu_memory_utilization", config.gpu_memory_utilization
    if num_bytes < block_bytes:
        raise ConfigError(path, value, f"must leave room for at least one KV block of {block_bytes} bytes")
    return min(num_bytes // block_bytes, usable)


def num_host_blocks(layout: KVLayout, num_blocks: int, max_model_len: int, config: EngineConfig) -> int:
    """Blocks of host memory for parked requests: no more than can be used, so none where nobody has to give way."""
    usable = config.max_num_seqs * -(-max_model_len // config.block_size)
    return min(int(config.swap_space * 2**30) // layout.bytes_per_block, usable) if num_blocks < usable else 0


def _free_bytes(model: Model, layout: KVLayout, config: EngineConfig, device: torch.device, max_model_len: int) -> int:
    """What is left of the configured share of the GPU, the activations of the largest step taken off."""
    plan, num_blocks = _largest_plan(config, max_model_len)
    runner = Runner(model, KVStorage(layout, num_blocks, device))
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    runner.run(plan)
    activations = torch.cuda.max_memory_allocated(device) - before
    del runner
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    return int(total * config.gpu_memory_utilization) - (total - free) - activations


def _largest_plan(config: EngineConfig, max_model_len: int) -> tuple[Plan, int]:
    """As many sampled rows and as many tokens as a step can have, and the number of blocks that it takes."""
    sampling = SamplingParams(max_tokens=1, top_p=0.9)
    speculation = config.speculative_config
    per_request = 1 if speculation.method is None else 1 + speculation.num_speculative_tokens
    num_rows = min(config.max_num_seqs * per_request, config.max_num_batched_tokens)
    rows = [PlanEntry(f"row {i}", (0,), 0, (i,), sampling) for i in range(num_rows)]
    num_tokens = min(config.max_num_batched_tokens, max_model_len)
    end = len(rows) + -(-num_tokens // config.block_size)
    prompt = PlanEntry("prompt", (0,) * num_tokens, 0, tuple(range(len(rows), end)), None)
    return Plan((*rows, prompt)), end
