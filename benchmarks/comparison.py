"""Engines side by side on one model: each in its process, one at a time, in turns."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.engine_process import EngineError, EngineProcess, EngineSpec
from benchmarks.peers.driver import Run
from benchmarks.workloads import Workload

Say = Callable[[str], None]


@dataclass(slots=True)
class Measured:
    """Of one model. Keys are labels of engines, and names of workloads."""

    names: dict[str, str] = field(default_factory=dict)
    """Engines and their versions."""
    start_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    """From the start of a process to its first token."""
    load_s: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    tokens_per_s: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    """By (workload, engine)."""
    read_bytes_per_s: list[float] = field(default_factory=list)
    """How fast memory was read just before an engine decoded one sequence."""
    tokens: dict[tuple[str, int, str], list[list[int]]] = field(default_factory=dict)
    """What was written, by (workload, round, engine)."""
    failures: dict[str, str] = field(default_factory=dict)
    """Engine: why it has no, or not all, figures."""
    notes: dict[str, str] = field(default_factory=dict)
    """Engine: what it is not, though its label says so, and why."""

    def median(self, workload: str, engine: str) -> float | None:
        samples = self.tokens_per_s.get((workload, engine))
        return statistics.median(samples) if samples else None

    def agreement(self, one: str, other: str) -> tuple[int, int]:
        """How many sequences both wrote alike, and how many both wrote."""
        pairs = [
            (a, b)
            for (workload, turn, engine), tokens in self.tokens.items()
            if engine == one and (workload, turn, other) in self.tokens
            for a, b in zip(tokens, self.tokens[workload, turn, other], strict=True)
        ]
        return sum(a == b for a, b in pairs), len(pairs)


class Comparison:
    """`vocab_size`: of the ids that prompts are drawn from. Once `in_time` is false, nothing more is begun.

    `read_rate` measures how fast memory is read now, in bytes/s: on a shared machine that changes by the minute, so it
    is measured beside what is held against it.
    """

    def __init__(
        self,
        specs: Sequence[EngineSpec],
        vocab_size: int,
        log_folder: Path,
        say: Say,
        in_time: Callable[[], bool] = lambda: True,
        read_rate: Callable[[], float] | None = None,
    ) -> None:
        self._specs = specs
        self._vocab_size = vocab_size
        self._log_folder = log_folder
        self._say = say
        self._in_time = in_time
        self._read_rate = read_rate
        self._running: dict[str, EngineProcess] = {}
        self.measured = Measured()

    @contextmanager
    def started(self) -> Iterator[None]:
        """Start all engines, one after the other; the others stand still meanwhile. All end with the context."""
        with ExitStack() as stack:
            for spec in self._specs:
                if self._in_time():
                    self._start(spec, stack)
                else:
                    self.measured.failures[spec.label] = "the time was up before it could start"
            yield
            for process in self._running.values():
                process.hang_up()

    def _start(self, spec: EngineSpec, stack: ExitStack) -> None:
        self._say(f"start {spec.label}")
        process = stack.enter_context(self._process(spec))
        measured, label = self.measured, spec.label
        try:
            start_s = process.first_token_s(START_PROMPT)
        except EngineError as error:
            self._fail(process, error)
            if spec.fallback is not None:
                self._start(spec.fallback, stack)
                if label in self._running:
                    measured.notes[label] = f"{spec.fallback.note}; {measured.failures.pop(label)}"
            return
        process.pause()
        self._running[label] = process
        measured.names[label] = process.name
        measured.start_s[label].append(start_s)
        measured.load_s[label].append(process.load_s)
        self._say(f"{label}: first token {start_s:.1f} s after the start")

    def _process(self, spec: EngineSpec) -> EngineProcess:
        return EngineProcess(spec, self._log_folder / f"{spec.label.replace(' ', '-')}.log")

    def restart(self, spec: EngineSpec) -> None:
        """Start a process once more, only for its times, and end it."""
        with self._process(spec) as process:
            try:
                self.measured.start_s[spec.label].append(process.first_token_s(START_PROMPT))
                self.measured.load_s[spec.label].append(process.load_s)
            except EngineError as error:
                self._say(str(error))

    def warm_up(self, workloads: Sequence[Workload]) -> None:
        """Every engine runs prompts of each kind once, with few outputs."""
        for label in list(self._running):
            self._say(f"warm up {label}")
            for workload in workloads:
                self._run(label, workload.prompts(-1, self._vocab_size), min(2, workload.num_outputs))

    def turn(
        self,
        number: int,
        workloads: Sequence[Workload],
        *,
        only: Sequence[str] | None = None,
    ) -> None:
        """Every workload on every engine (or those that `only` names); who begins changes from turn to turn.

        The first workload is run in any case.
        """
        for workload in workloads:
            if workload is not workloads[0] and not self._in_time():
                self._say(f"the time is up: no {workload.name}")
                return
            self._say(f"turn {number + 1}: {workload.name}")
            prompts = workload.prompts(number, self._vocab_size)
            labels = [label for label in self._running if only is None or label in only]
            shift = number % len(labels) if labels else 0
            for label in labels[shift:] + labels[:shift]:
                if workload.is_bound_by_reading and self._read_rate is not None:
                    self.measured.read_bytes_per_s.append(self._read_rate())
                if run := self._run(label, prompts, workload.num_outputs):
                    self.measured.tokens_per_s[workload.name, label].append(workload.tokens_per_s(run))
                    self.measured.tokens[workload.name, number, label] = run.tokens

    def _run(self, label: str, prompts: list[list[int]], num_outputs: int) -> Run | None:
        if (process := self._running.get(label)) is None:
            return None
        process.resume()
        try:
            return process.run(prompts, num_outputs)
        except EngineError as error:
            self._fail(process, error)
            return None
        finally:
            process.pause()

    def _fail(self, process: EngineProcess, error: EngineError) -> None:
        """The others go on."""
        self._say(str(error))
        self.measured.failures[process.spec.label] = str(error)
        self._running.pop(process.spec.label, None)
        process.close()


START_PROMPT = list(range(100, 132))
