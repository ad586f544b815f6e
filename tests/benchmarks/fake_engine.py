"""An engine for the tests: python -m tests.benchmarks.fake_engine BEHAVIOUR

It draws the sum of the prompt and of what came before. BEHAVIOUR: good, other (its sums are off by one), broken (fails
to load), fails (at its second run), dies (at its second run), silent (at its second run).
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator

from benchmarks.peers.driver import Drawn, serve_stdio


class Fake:
    name = "Fake 1"

    def __init__(self, behaviour: str) -> None:
        print("this is no answer")
        if behaviour == "broken":
            print("KernelError: the real reason", file=sys.stderr)
            raise RuntimeError("see the log")
        self._behaviour = behaviour
        self._num_runs = 0

    def steps(self, prompts: list[list[int]], num_outputs: int) -> Iterator[Drawn]:
        self._num_runs += 1
        if self._num_runs == 2 and self._behaviour == "fails":
            raise ValueError("one run failed")
        if self._num_runs == 2 and self._behaviour == "dies":
            os._exit(3)
        if self._num_runs == 2 and self._behaviour == "silent":
            time.sleep(60)
        sums = [sum(prompt) + (self._behaviour == "other") for prompt in prompts]
        for _ in range(num_outputs):
            yield list(enumerate(sums))
            sums = [2 * total for total in sums]


if __name__ == "__main__":
    serve_stdio(lambda: Fake(sys.argv[1]))
