"""Rows of a comparison: every figure beside a peer's, its target, and what the machine allows."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from benchmarks.ceilings import Ceilings
from benchmarks.comparison import Measured
from benchmarks.model_cost import WEIGHT_BYTES, ModelCost
from benchmarks.rows import Row
from benchmarks.workloads import READ_TARGET, START_TARGET, Targets, Workload

OURS_FLOAT32, OURS_INT8 = "fp32", "W8A8"
OURS_INT8_LIKE_VLLM = "W8A8 with fp32 output matrix"
"""vLLM can't read the output matrix as int8 where it is the embedding too; ours can, and does."""
VLLM_FLOAT32, VLLM_INT8 = "vLLM fp32", "vLLM W8A8"
LLAMA_CPP, TRANSFORMERS = "llama.cpp Q8_0", "transformers fp32"


@dataclass(frozen=True, slots=True)
class Missing:
    """A row that could not be measured, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Pair:
    ours: str
    peer: str
    precision: str
    """Of ours, which the ceiling is for."""

    def target(self, targets: Targets) -> float:
        """0: for the record."""
        goals = {
            (OURS_FLOAT32, VLLM_FLOAT32): targets.float32,
            (OURS_INT8, VLLM_INT8): targets.int8,
            (OURS_INT8, VLLM_FLOAT32): targets.int8_float32,
        }
        return goals.get((self.ours, self.peer), 0.0)


PAIRS = (
    Pair(OURS_FLOAT32, VLLM_FLOAT32, "float32"),
    Pair(OURS_INT8, VLLM_INT8, "int8"),
    Pair(OURS_INT8, VLLM_FLOAT32, "int8"),
    Pair(OURS_INT8_LIKE_VLLM, VLLM_INT8, "int8"),
    Pair(OURS_INT8, LLAMA_CPP, "int8"),
    Pair(OURS_FLOAT32, TRANSFORMERS, "float32"),
)


def comparison_rows(
    model: str, measured: Measured, workloads: Sequence[Workload], cost: ModelCost, machine: Ceilings
) -> tuple[list[Row], list[Missing]]:
    """Of every workload and pair, and of the start; engines without figures are in the second list."""
    rows: list[Row] = []
    absent: list[str] = []
    for workload in workloads:
        for pair in PAIRS:
            ours, peer = (measured.median(workload.name, engine) for engine in (pair.ours, pair.peer))
            if ours is None or peer is None:
                absent += [engine for engine, rate in ((pair.ours, ours), (pair.peer, peer)) if rate is None]
                continue
            name = f"{model}, {workload.name}, {pair.ours} by {pair.peer}"
            target = pair.target(workload.experts if cost.num_experts > 1 else workload.dense)
            ceiling = workload.ceiling(cost, machine, pair.precision)
            detail = measured.notes.get(pair.peer, "")
            rows.append(Row.of(name, ours, "tokens/s", target, peer, ceiling=ceiling, detail=detail))
    rows += start_rows(model, measured)
    reasons = {engine: _reason(measured, engine) for engine in absent}
    return rows, [Missing(f"{model}, rows with {engine}", reason) for engine, reason in reasons.items()]


def read_rows(
    model: str, measured: Measured, workloads: Sequence[Workload], cost: ModelCost, machine: Ceilings
) -> Iterator[Row]:
    """How near the decode of one sequence comes to reading memory as fast as the machine can; fp32."""
    for workload in workloads:
        rate = measured.median(workload.name, OURS_FLOAT32)
        if workload.is_bound_by_reading and rate is not None:
            context = workload.num_inputs + workload.num_outputs // 2
            num_bytes = cost.bytes_read(1, context, WEIGHT_BYTES["float32"])
            detail = f"{num_bytes / 1e6:.1f} MB a step x {rate:.2f} steps/s, by the read bandwidth between the turns"
            name = f"{model}, {workload.name}, fp32, share of read bandwidth"
            bandwidth = statistics.median(measured.read_bytes_per_s or [machine.read_bytes_per_s]) / 1e9
            yield Row.of(name, num_bytes * rate / 1e9, "GB/s", READ_TARGET, bandwidth, detail=detail)


def start_rows(model: str, measured: Measured) -> Iterator[Row]:
    """Starts in a second, so that more is better; `detail` has the seconds."""
    for ours, peer, target in (
        (OURS_FLOAT32, VLLM_FLOAT32, START_TARGET),
        (OURS_INT8, VLLM_INT8, 0.0),
        (OURS_FLOAT32, TRANSFORMERS, 0.0),
    ):
        if measured.start_s.get(ours) and measured.start_s.get(peer):
            own_s, peer_s = (statistics.median(measured.start_s[engine]) for engine in (ours, peer))
            name = f"{model}, process start to first token, {ours} by {peer}"
            detail = f"{own_s:.2f} s, theirs {peer_s:.1f} s"
            yield Row.of(name, 1 / own_s, "1/s", target, 1 / peer_s, detail=detail)


def _reason(measured: Measured, engine: str) -> str:
    ran = "some of them: the time was up" if engine in measured.names else "it was not run"
    return measured.failures.get(engine, ran)
