"""What is sent and when: arrivals, lengths, and prompts of exactly so many tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from benchmarks.serve.traces import BLOCK_TOKENS, TraceRow

FIRST_TOKEN_ID = 16
"""Below are often tokens with a meaning of their own."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One request: due so long after the start, of so many tokens.

    `hash_ids` are what its prompt shares with others, block by block of `block_tokens`; `prefix_tokens` it shares with
    all. The rest of the prompt is its own.
    """

    index: int
    due_s: float
    num_inputs: int
    num_outputs: int
    hash_ids: tuple[int, ...] = ()
    block_tokens: int = BLOCK_TOKENS
    prefix_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Scale:
    """How a recorded load is made to fit: a second of it takes `time` seconds; lengths are multiplied, then cut."""

    time: float = 1.0
    inputs: float = 1.0
    outputs: float = 1.0
    max_inputs: int | None = None
    max_outputs: int | None = None

    def plan(self, index: int, row: TraceRow) -> Plan:
        return Plan(
            index,
            row.at_s * self.time,
            _scaled(row.num_inputs, self.inputs, self.max_inputs),
            _scaled(row.num_outputs, self.outputs, self.max_outputs),
            row.hash_ids,
            max(1, round(BLOCK_TOKENS * self.inputs)),
        )


def _scaled(count: int, factor: float, limit: int | None) -> int:
    scaled = max(1, round(count * factor))
    return scaled if limit is None else min(scaled, limit)


def arrivals_s(count: int, rate: float, burstiness: float, seed: int) -> list[float]:
    """When `count` requests come: the first at 0, then by gaps of a gamma distribution with mean 1 / rate.

    `burstiness` is its shape, as in vLLM: 1 is Poisson, less is burstier, more is more even. An infinite rate is all
    at once.
    """
    if math.isinf(rate) or count < 2:
        return [0.0] * count
    gaps = np.random.default_rng([seed, 1]).gamma(burstiness, 1.0 / (rate * burstiness), count - 1)
    return [0.0, *np.cumsum(gaps).tolist()]


def random_lengths(count: int, mean: int, range_ratio: float, seed: Sequence[int]) -> list[int]:
    """Uniform in mean * (1 - range_ratio) to mean * (1 + range_ratio), at least 1."""
    low, high = math.floor(mean * (1 - range_ratio)), math.ceil(mean * (1 + range_ratio))
    lengths: list[int] = np.random.default_rng(seed).integers(max(1, low), max(1, high) + 1, count).tolist()
    return lengths


def at_rate(plans: Sequence[Plan], rate: float, burstiness: float, seed: int) -> list[Plan]:
    """The same requests, at other times."""
    due = arrivals_s(len(plans), rate, burstiness, seed)
    return [
        Plan(p.index, due_s, p.num_inputs, p.num_outputs, p.hash_ids, p.block_tokens, p.prefix_tokens)
        for p, due_s in zip(plans, due, strict=True)
    ]


class Prompts:
    """Token ids for plans, drawn from `seed`: the same plan has the same prompt in every run."""

    def __init__(self, vocab_size: int, seed: int = 0) -> None:
        self._low = min(FIRST_TOKEN_ID, vocab_size - 1)
        self._vocab_size = vocab_size
        self._seed = seed
        self._block = lru_cache(maxsize=4096)(self._draw)

    def token_ids(self, plan: Plan) -> list[int]:
        """Of the length planned, but where its blocks are shorter by rounding."""
        if plan.hash_ids:
            blocks = [self._block(2, hash_id, plan.block_tokens) for hash_id in plan.hash_ids]
            ids = np.concatenate(blocks)[: plan.num_inputs]
            missing = plan.num_inputs - len(ids)
            own = self._draw(3, plan.index, missing) if missing > 0 else ids[:0]
            return [*ids.tolist(), *own.tolist()]
        shared = min(plan.prefix_tokens, plan.num_inputs)
        own = self._draw(3, plan.index, plan.num_inputs - shared)
        return [*self._block(4, 0, shared).tolist(), *own.tolist()] if shared else own.tolist()

    def _draw(self, kind: int, name: int, count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
        return np.random.default_rng([self._seed, kind, name]).integers(self._low, self._vocab_size, count)
