"""Rows that need no peer: the embedded model, memory, and loading."""

from __future__ import annotations

import statistics
from pathlib import Path

from benchmarks.comparison import START_PROMPT
from benchmarks.engine_process import EngineProcess, own_spec
from benchmarks.model_cost import ModelCost
from benchmarks.rows import Row
from benchmarks.workloads import Measure, Targets, Workload

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "models" / "penstock-tiny"
TINY_TARGET = 800.0
"""Tokens in a second on one core."""
LOAD_TARGET = 400e6 / 3
"""Bytes in a second: 400 MB ready in 3 s."""
SLACK_BYTES = 300 * 2**20
"""For the interpreter, torch, and activations."""
LARGE_BYTES = 200e6
MIB, BLOCK_SIZE = 2**20, 16
_NONE = Targets(0, 0, 0)


def tiny_row(log: Path, num_rounds: int) -> Row:
    """One core, so that only the overhead of a step counts. Raises `EngineError`."""
    workload = Workload("", Measure.DECODE, 1, 32, 256, _NONE, _NONE)
    with EngineProcess(own_spec("embedded model", TINY, ROOT, num_threads=1), log) as process:
        process.first_token_s(START_PROMPT)
        rates = [
            workload.tokens_per_s(process.run(workload.prompts(seed, vocab_size=3000), workload.num_outputs))
            for seed in range(num_rounds + 1)
        ]
    return Row.of("penstock-tiny, decode, batch 1, one core", statistics.median(rates[1:]), "tokens/s", TINY_TARGET)


def memory_row(model: Path, log: Path, num_threads: int) -> Row:
    """Peak of a fresh process that served 8 x (512 in, 64 out) with a cache of just that size; fp32.

    The embedding is taken to be the output matrix too. Raises `EngineError`.
    """
    workload = Workload("", Measure.OUTPUT, 8, 512, 64, _NONE, _NONE)
    num_blocks = workload.num_sequences * -(-(workload.num_inputs + workload.num_outputs + 1) // BLOCK_SIZE)
    cost = ModelCost.from_folder(model)
    weights = checkpoint_bytes(model)
    budget = weights + num_blocks * BLOCK_SIZE * cost.kv_bytes_per_token + SLACK_BYTES
    config = {"num_threads": num_threads, "num_blocks": num_blocks, "block_size": BLOCK_SIZE}
    with EngineProcess(own_spec(model.name, model, ROOT, **config), log) as process:
        process.wait_ready()
        process.run(workload.prompts(0), workload.num_outputs)
        peak = process.peak_rss_bytes()
    kv = budget - weights - SLACK_BYTES
    detail = (
        f"budget = weights {weights / MIB:.0f} + KV {kv / MIB:.0f} + {SLACK_BYTES / MIB:.0f} MiB = "
        f"{budget / MIB:.0f} MiB, by the peak of {peak / MIB:.0f} MiB"
    )
    return Row.of(f"{model.name}, memory budget by peak RSS, fp32", budget / peak, "x", 1.0, detail=detail)


def load_row(model: Path, load_s: list[float]) -> Row:
    """`load_s`: of processes that found the checkpoint in the page cache."""
    median_s = statistics.median(load_s)
    num_bytes = checkpoint_bytes(model)
    detail = f"{num_bytes / 1e6:.0f} MB in {median_s:.2f} s, which is 400 MB in {400e6 / num_bytes * median_s:.2f} s"
    return Row.of(f"{model.name}, load, fp32", num_bytes / median_s / 1e6, "MB/s", LOAD_TARGET / 1e6, detail=detail)


def checkpoint_bytes(model: Path) -> int:
    return sum(path.stat().st_size for path in model.glob("*.safetensors"))


def is_large(model: Path) -> bool:
    """Whether weights must come from memory, and a load takes long enough to be measured."""
    return checkpoint_bytes(model) >= LARGE_BYTES


def read_once(model: Path) -> None:
    """Into the page cache, so that every engine finds it there."""
    for path in model.iterdir():
        with path.open("rb") as file:
            while file.read(1 << 24):
                pass
