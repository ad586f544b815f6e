"""What every engine is asked to do, and how much faster than which we mean to be: the table of the benchmark."""

from __future__ import annotations

import random
from dataclasses import dataclass
from enum import Enum

from benchmarks.ceilings import Ceilings
from benchmarks.model_cost import ModelCost, decode_step_s, prefill_s
from benchmarks.peers.driver import Run


class Measure(Enum):
    """Tokens in a second, by the times of a `Run`. Loading, tokenizer and text are in none of them."""

    PREFILL = "prompt tokens / time from handing over the prompts to the last of their first tokens"
    DECODE = "tokens after the last of the first tokens / time from there to the last token"
    OUTPUT = "output tokens / time from handing over the prompts to the last token"


@dataclass(frozen=True, slots=True)
class Targets:
    float32: float
    """Ours in float32, by vLLM in float32."""
    int8: float
    """Ours in W8A8, by vLLM in W8A8."""
    int8_float32: float
    """Ours in W8A8, by vLLM in float32."""


@dataclass(frozen=True, slots=True)
class Workload:
    """`num_sequences` prompts of random tokens at once; each writes `num_outputs` tokens, the most likely ones."""

    name: str
    measure: Measure
    num_sequences: int
    num_inputs: int
    num_outputs: int
    dense: Targets
    experts: Targets

    @property
    def is_bound_by_reading(self) -> bool:
        """Each token takes all weights from memory, and hardly any time besides."""
        return self.measure is Measure.DECODE and self.num_sequences == 1

    def prompts(self, seed: int, vocab_size: int = 7000) -> list[list[int]]:
        """Of ids below `vocab_size`, no special ones among them; the same for the same seed."""
        draw = random.Random(seed)
        return [[draw.randrange(10, vocab_size) for _ in range(self.num_inputs)] for _ in range(self.num_sequences)]

    def tokens_per_s(self, run: Run) -> float:
        num_tokens = sum(map(len, run.tokens))
        match self.measure:
            case Measure.PREFILL:
                return self.num_sequences * self.num_inputs / run.first_s
            case Measure.DECODE:
                return (num_tokens - run.num_before) / (run.end_s - run.first_s)
            case Measure.OUTPUT:
                return num_tokens / run.end_s

    def ceiling(self, cost: ModelCost, machine: Ceilings, precision: str) -> float:
        """The tokens in a second that no engine on this machine can pass, by its rates of reading and multiplying."""
        prefill = prefill_s(cost, machine, precision, self.num_sequences, self.num_inputs)
        context = self.num_inputs + self.num_outputs / 2
        step = decode_step_s(cost, machine, precision, self.num_sequences, context)
        match self.measure:
            case Measure.PREFILL:
                return self.num_sequences * self.num_inputs / prefill
            case Measure.DECODE:
                return self.num_sequences / step
            case Measure.OUTPUT:
                return self.num_sequences * self.num_outputs / (prefill + (self.num_outputs - 1) * step)


def _workload(
    name: str, measure: Measure, size: tuple[int, int, int], dense: Targets, experts_float32: float | None = None
) -> Workload:
    """`experts_float32`: the first target, where it is another one for models with experts."""
    float32 = dense.float32 if experts_float32 is None else experts_float32
    return Workload(name, measure, *size, dense, Targets(float32, dense.int8, dense.int8_float32))


WORKLOADS = (
    _workload("prefill 4 x 512", Measure.PREFILL, (4, 512, 1), Targets(1.1, 1.2, 2.5)),
    _workload("decode, batch 1", Measure.DECODE, (1, 32, 64), Targets(0.97, 1.2, 2.5)),
    _workload("decode, batch 8", Measure.DECODE, (8, 32, 64), Targets(1.1, 1.3, 3.0), experts_float32=1.05),
    _workload("decode, batch 32", Measure.DECODE, (32, 32, 64), Targets(1.3, 1.3, 3.0), experts_float32=1.25),
    _workload("8 x (512 in, 64 out)", Measure.OUTPUT, (8, 512, 64), Targets(1.1, 1.3, 2.5)),
)
QUICK_WORKLOADS = (
    _workload("prefill 1 x 512", Measure.PREFILL, (1, 512, 1), Targets(1.1, 1.2, 2.5)),
    _workload("decode, batch 1", Measure.DECODE, (1, 32, 24), Targets(0.97, 1.2, 2.5)),
    _workload("decode, batch 8", Measure.DECODE, (8, 32, 24), Targets(1.1, 1.3, 3.0), experts_float32=1.05),
)
START_TARGET = 8.0
"""Process start to first token, by vLLM's."""
READ_TARGET = 0.85
"""Of the bandwidth, by a decode step of one sequence."""
