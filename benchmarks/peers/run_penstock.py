"""Penstock's engine through its public interface: python -m benchmarks.peers.run_penstock MODEL_FOLDER CONFIG_JSON

CONFIG_JSON holds fields of `EngineConfig`.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Iterator

from benchmarks.peers.driver import Drawn, serve_stdio
from core.request import Request
from core.sampling import SamplingParams
from engine.config import EngineConfig, SpeculativeConfig
from engine.engine import Engine


class Penstock:
    name = "Penstock"

    def __init__(self, model: str, config: EngineConfig) -> None:
        self._engine = Engine.from_checkpoint(model, config)
        self._ids = itertools.count()

    def steps(self, prompts: list[list[int]], num_outputs: int) -> Iterator[Drawn]:
        scheduler, sequences = self._engine.scheduler, dict[str, int]()
        for sequence, prompt in enumerate(prompts):
            request_id = str(next(self._ids))
            sequences[request_id] = sequence
            scheduler.add(Request(request_id, prompt, SamplingParams(max_tokens=num_outputs, temperature=0)))
        while scheduler.requests:
            outputs = self._engine.step()
            yield [(sequences[out.request.request_id], token) for out in outputs for token in out.token_ids]


def main(model: str, config_json: str) -> None:
    fields = json.loads(config_json)
    if fields.get("num_threads") and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, cores[: fields["num_threads"]])  # whatever runs beside our threads has no more cores
    if "speculative_config" in fields:
        fields["speculative_config"] = SpeculativeConfig(**fields["speculative_config"])
    serve_stdio(lambda: Penstock(model, EngineConfig(**fields)))


if __name__ == "__main__":
    main(*sys.argv[1:])
