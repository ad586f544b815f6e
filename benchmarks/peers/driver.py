"""One engine behind lines of JSON: what `benchmarks.engines` starts, once for each engine that it compares.

The drivers of other engines run in an environment of their own, so this file imports nothing but the standard library.
A command is a line on stdin, its answer a line on stdout; what the engine itself prints goes to stderr.

| command                                        | answer                                                          |
|------------------------------------------------|-----------------------------------------------------------------|
| (none: sent first, once the weights are there) | `{"engine": name and version, "load_s": seconds}`               |
| `{"prompts": [[id, ...], ...], "outputs": n}`  | a `Run`: every sequence writes n tokens, greedily, past any end |
| `{"memory": true}`                             | `{"peak_rss_bytes": of this process and its children}`          |

What goes wrong is answered with `{"error": text}`. The end of stdin ends the process.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Protocol, TextIO

Drawn = list[tuple[int, int]]
"""(sequence, token id) of each token that a step drew."""


class Driver(Protocol):
    name: str
    """The engine and its version."""

    def steps(self, prompts: list[list[int]], num_outputs: int) -> Iterator[Drawn]:
        """Run the prompts together; what each step drew. Sequences are numbered as the prompts are."""
        ...


@dataclass(frozen=True)
class Run:
    """Times count from the moment the prompts are handed over."""

    first_s: float
    """When the last of the sequences had its first token: from here on all of them decode."""
    end_s: float
    num_before: int
    """Tokens drawn by `first_s`."""
    tokens: list[list[int]]
    """Of each sequence."""


def timed(steps: Iterable[Drawn], num_sequences: int, clock: Callable[[], float] = time.perf_counter) -> Run:
    """Raises `ValueError` where a sequence got no token."""
    start_s = clock()
    tokens: list[list[int]] = [[] for _ in range(num_sequences)]
    first_s, num_before, missing = 0.0, 0, num_sequences
    for drawn in steps:
        for sequence, token in drawn:
            missing -= not tokens[sequence]
            tokens[sequence].append(token)
        if missing == 0 and num_before == 0:
            first_s, num_before = clock() - start_s, sum(map(len, tokens))
    if missing:
        raise ValueError(f"{missing} of {num_sequences} sequences got no token")
    return Run(first_s, clock() - start_s, num_before, tokens)


def serve(make: Callable[[], Driver], commands: Iterable[str], answers: TextIO) -> None:
    """Answer every command, until there is none any more."""

    def answer(value: dict[str, object]) -> None:
        print(json.dumps(value), file=answers, flush=True)

    start_s = time.perf_counter()
    try:
        driver = make()
    except Exception as error:  # noqa: BLE001 (whatever it is, the benchmark wants to name it)
        traceback.print_exc()
        answer({"error": _text(error)})
        return
    answer({"engine": driver.name, "load_s": time.perf_counter() - start_s})
    for line in commands:
        try:
            answer(_obey(driver, json.loads(line)))
        except Exception as error:  # noqa: BLE001
            traceback.print_exc()
            answer({"error": _text(error)})


def serve_stdio(make: Callable[[], Driver]) -> None:
    """Serve on stdin and stdout; whatever else is printed, in child processes too, goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    serve(make, iter(sys.stdin.readline, ""), answers)


def _obey(driver: Driver, command: dict[str, object]) -> dict[str, object]:
    match command:
        case {"prompts": list(prompts), "outputs": int(num_outputs)}:
            return asdict(timed(driver.steps(prompts, num_outputs), len(prompts)))
        case {"memory": True}:
            return {"peak_rss_bytes": peak_rss_bytes()}
        case _:
            raise ValueError(f"unknown command: {sorted(command)}")


def peak_rss_bytes() -> int:
    """Of this process; Linux counts it in KiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _text(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines)[:500]}"
