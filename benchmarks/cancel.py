"""How long a cancel takes from a client to the worker that stops, in each state of a request.

    python -m benchmarks.cancel [--times 100] [--json]

A router, a prefill and a decode worker as processes of this machine. The engine of the worker that is told stands still
all the while, in the middle of the named step: a cancel must not wait for it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass

from benchmarks.machine import machine
from tests.faults.cancels import HOLDERS, delivery_s
from tests.faults.control import world

TARGET_MS = 50.0


@dataclass(frozen=True, slots=True)
class Row:
    """Milliseconds from the client's call until the worker sends and takes nothing more."""

    step: str
    num_cancels: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    max_ms: float


def row(step: str, took_s: list[float]) -> Row:
    in_order = sorted(1000 * each for each in took_s)

    def percentile(share: float) -> float:
        return round(in_order[min(len(in_order) - 1, int(share * len(in_order)))], 2)

    return Row(step, len(in_order), percentile(0.5), percentile(0.9), percentile(0.99), round(in_order[-1], 2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=100, help="cancels in each state")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    arguments = parser.parse_args()
    rows: list[Row] = []
    everything: list[float] = []
    with world(1, 1) as made, made.client() as client:
        for step in HOLDERS:
            took_s = [delivery_s(made, client, step, f"{step.value} {i}") for i in range(arguments.times)]
            rows.append(row(step.value, took_s))
            everything += took_s
    rows.append(row("all", everything))
    for each in rows:
        met = "" if each.p99_ms <= TARGET_MS else f", more than {TARGET_MS:g} ms"
        print(f"{each.step:8} p50 {each.p50_ms} p90 {each.p90_ms} p99 {each.p99_ms} max {each.max_ms} ms{met}")
    if arguments.json:
        command = f"python -m benchmarks.cancel --times {arguments.times} --json"
        print(
            json.dumps(
                {
                    "command": command,
                    "machine": machine(),
                    "target_ms": TARGET_MS,
                    "rows": [asdict(each) for each in rows],
                }
            )
        )


if __name__ == "__main__":
    main()
