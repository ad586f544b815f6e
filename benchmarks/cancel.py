"""How long a cancel takes from a client to the worker that stops, in each state of a request.

    python -m benchmarks.cancel [--quick] [--json] [--output FILE]

A router, a prefill and a decode worker as processes of this machine. The engine of the worker that is told stands still
all the while, in the middle of the named step: a cancel must not wait for it. Time counts from the client's call until
the worker sends and takes nothing more; rows are the inverse of the 99th percentile, so that more is better.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from benchmarks.command import run_command
from benchmarks.rows import Row
from tests.faults.cancels import HOLDERS, delivery_s
from tests.faults.control import world

MAX_S = 0.05


def run(quick: bool) -> list[Row]:
    took_s: dict[str, list[float]] = {}
    with world(1, 1) as made, made.client() as client:
        for step in HOLDERS:
            times = 10 if quick else 100
            took_s[step.value] = [delivery_s(made, client, step, f"{step.value} {i}") for i in range(times)]
    took_s["any of these"] = [each for times_s in took_s.values() for each in times_s]
    return [row_of(step, times_s) for step, times_s in took_s.items()]


def row_of(step: str, took_s: Sequence[float]) -> Row:
    percentiles = statistics.quantiles(took_s, n=100, method="inclusive")
    p90, p99 = percentiles[89], percentiles[98]
    detail = (
        f"p50 {1e3 * statistics.median(took_s):.2f} ms, p90 {1e3 * p90:.2f}, p99 {1e3 * p99:.2f}, longest "
        f"{1e3 * max(took_s):.2f}, of {len(took_s)}; at most {1e3 * MAX_S:.0f} ms"
    )
    return Row.of(f"cancel in the middle of {step}", 1 / p99, "1/s", 1 / MAX_S, detail=detail)


if __name__ == "__main__":
    run_command("cancel", __doc__, run)
