"""What sending KV costs a prefill of a real model, and what of it is not hidden behind computing."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.peer_engines import VARIABLE
from benchmarks.rows import Row
from benchmarks.transfer_link import Link, Load, Sending, link
from core.sampling import SamplingParams
from engine.config import EngineConfig
from engine.engine import Engine
from engine.plan import Plan, PlanEntry

NAME = "llama-120m"
PROMPTS = (64, 512, 2048)
"""Tokens; targets are set from 512 on."""
SHORT_PROMPTS = (16, 64, 128, 256, 512)
"""Among which is the length from which on it pays to send layer by layer."""
QUICK_REPEATS = 5
TARGET_TOKENS, MAX_STEP_TOKENS = 512, 2048
MAX_EXPOSED_BESIDE_LAST_S = 0.002
MAX_SLOW_DOWN = 0.02


@dataclass(frozen=True, slots=True)
class Measured:
    """Medians, in seconds."""

    alone_s: float
    """The step with nothing to send."""
    step_s: float
    """The same step while its KV leaves."""
    exposed_s: float
    """From the end of the step to the word that decode may begin."""
    last_s: float
    """From the last layer to that word, where all others have come before."""


def prefill_rows(num_repeats: int) -> list[Row]:
    rows = []
    with model_folder() as folder:
        config = EngineConfig(
            num_blocks=MAX_STEP_TOKENS // 16, max_num_batched_tokens=MAX_STEP_TOKENS, num_threads=1, dtype="float32"
        )
        engine = Engine.from_checkpoint(folder, config)
        with link(engine.storage, "auto") as ours:
            for num_tokens in PROMPTS if num_repeats > QUICK_REPEATS else PROMPTS[:-1]:
                num = max(3, min(num_repeats, num_repeats * TARGET_TOKENS // num_tokens))
                rows += rows_of(num_tokens, measure(engine, ours, num_tokens, num))
            lengths, num = (SHORT_PROMPTS, 11) if num_repeats > QUICK_REPEATS else (SHORT_PROMPTS[:-2], 3)
            rows += crossover_rows({n: measure_ways(engine, ours, n, num) for n in lengths})
    return rows


@dataclass(frozen=True, slots=True)
class Ways:
    """What sending costs a prompt, in seconds: what its step takes longer, and what is exposed after it. Medians."""

    layerwise_s: float
    serial_s: float
    auto_s: float


def measure_ways(engine: Engine, ours: Link, num_tokens: int, num_repeats: int) -> Ways:
    """The three in turns, each less the step with nothing to send; the first turn does not count."""
    load, turns = Load(engine.layout, num_tokens), []
    for _ in range(num_repeats + 1):
        alone_s = timed(lambda: engine.runner.run(prompt(load)))
        costs = []
        for way in ("layerwise", "serial", "auto"):
            sending = ours.begin(load)
            costs.append(timed(lambda way=way, sending=sending: step(engine, load, sending, way)) - alone_s)  # type: ignore[misc]
        turns.append(costs)
    return Ways(*(statistics.median(costs) for costs in zip(*turns[1:], strict=True)))


def step(engine: Engine, load: Load, sending: Sending, way: str) -> None:
    """From a prompt to the word that decode may begin."""
    layers = range(engine.layout.num_layers)
    on_layer = {"layerwise": sending.push_at_once, "serial": None, "auto": sending.push}[way]
    engine.runner.run(prompt(load), on_layer)
    if way == "serial":
        for layer in layers:
            sending.push(layer)
    sending.finish()


def timed(work: Callable[[], object]) -> float:
    started_at = time.perf_counter()
    work()
    return time.perf_counter() - started_at


def crossover_rows(ways: dict[int, Ways]) -> list[Row]:
    """From which length on layer by layer is cheaper than serial, and what was chosen."""
    told = ", ".join(
        f"{n}: {1000 * w.serial_s:.1f} serial, {1000 * w.layerwise_s:.1f} layer by layer, {1000 * w.auto_s:.1f} chosen"
        for n, w in ways.items()
    )
    serial = [n for n, w in ways.items() if w.serial_s <= w.layerwise_s]
    longest = max(serial, default=0)
    detail = (
        f"longest prompt of these for which serial is not dearer; ms that sending adds to a prompt of n tokens: {told}"
    )
    return [Row.of(f"{NAME}: crossover from serial to layer by layer", longest, "tokens", 0.0, detail=detail)]


def rows_of(num_tokens: int, measured: Measured) -> list[Row]:
    wanted = num_tokens >= TARGET_TOKENS
    allowed_s = measured.last_s + MAX_EXPOSED_BESIDE_LAST_S
    exposed = (
        f"{1000 * measured.exposed_s:.2f} ms; the last segment's own time is {1000 * measured.last_s:.2f} ms, and "
        f"{1000 * MAX_EXPOSED_BESIDE_LAST_S:g} ms more are allowed"
    )
    slow_down = f"{100 * (measured.step_s / measured.alone_s - 1):+.1f} %: peer is the same step with nothing to send"
    return [
        Row.of(
            f"{NAME}, {num_tokens} tokens: KV that is not hidden",
            1 / measured.exposed_s,
            "1/s",
            1.0 if wanted else 0.0,
            1 / allowed_s,
            detail=exposed,
        ),
        Row.of(
            f"{NAME}, {num_tokens} tokens: prefill while KV leaves",
            num_tokens / measured.step_s,
            "tokens/s",
            1 - MAX_SLOW_DOWN if wanted else 0.0,
            num_tokens / measured.alone_s,
            detail=slow_down,
        ),
    ]


def measure(engine: Engine, ours: Link, num_tokens: int, num_repeats: int) -> Measured:
    """The three in turns; the first turn does not count."""
    load = Load(engine.layout, num_tokens)
    turns = []
    for _ in range(num_repeats + 1):
        started_at = time.perf_counter()
        engine.runner.run(prompt(load))
        alone_s = time.perf_counter() - started_at
        sending = ours.begin(load)
        started_at = time.perf_counter()
        engine.runner.run(prompt(load), sending.push)
        ended_at = time.perf_counter()
        sending.finish()
        turns.append((alone_s, ended_at - started_at, time.perf_counter() - ended_at, ours.last_segment(load)))
    return Measured(*(statistics.median(times) for times in zip(*turns[1:], strict=True)))


def prompt(load: Load) -> Plan:
    """One step that computes a whole prompt and draws a token."""
    token_ids = tuple(torch.randint(5, 1000, (load.num_tokens,)).tolist())
    return Plan((PlanEntry("prompt", token_ids, 0, load.blocks, SamplingParams(max_tokens=1, temperature=0.0)),))


@contextmanager
def model_folder() -> Iterator[Path]:
    """Of the peers' folder, or a random model of that size."""
    peers = os.environ.get(VARIABLE)
    if peers is not None and (folder := Path(peers) / "models" / NAME).exists():
        yield folder
        return
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=4096,
    )
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as made:
        LlamaForCausalLM(config).save_pretrained(made)
        yield Path(made)
