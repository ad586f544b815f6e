"""Our server beside vLLM's, on the same cores under the same load, in turns: `python -m benchmarks.serving`.

    python -m benchmarks.serving --trace AzureLLMInferenceTrace_conv.csv --minutes 15

The load is an open loop (`benchmarks.serve`) through the OpenAI API: lengths of the trace x 0.4 (prompt <= 1024, output
<= 128 tokens), Poisson arrivals, no shared prefixes, the same requests at the same times for every server. vLLM (from
$PENSTOCK_PEERS, see `benchmarks.peer_engines`) has all cores and runs at its default and with smaller steps; of the two
the better figure counts, column by column. Ours runs as one prefill and one decode worker, which share the cores, and
as one mixed worker that has them all. Servers that are not measured stand still.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from rich.console import Console

from benchmarks.engine_process import EngineError
from benchmarks.machine import machine
from benchmarks.peer_engines import VARIABLE, Peers
from benchmarks.serve.backends import OpenAIBackend, Shape
from benchmarks.serve.driver import Driver
from benchmarks.serve.http_stream import Url
from benchmarks.serve.records import Record
from benchmarks.serve.traces import TraceRow, read_trace
from benchmarks.serve.workload import Plan, Prompts, Scale, at_rate, random_lengths
from benchmarks.servers import ROOT, SERVED_NAME, Server, ServerSpec, described, penstock_server, vllm_server
from benchmarks.serving_table import Cells, print_cells, print_verdicts, summary, verdicts
from core.errors import ConfigError
from kernels.native import library

TINY = ROOT / "models" / "penstock-tiny"
SCALE, MAX_INPUTS, MAX_OUTPUTS, VOCAB_SIZE = 0.4, 1024, 128, 7000
EXTRA_BODY = {"return_token_ids": True}
"""Every token is told in a message, also one that has no text: random weights write many."""
WARM_UP = 4
START_S, TAIL_S = 12.0, 8.0
"""Reckoned for a start of our server with its warm-up, and for what is under way after the last arrival."""
MIN_REQUESTS, MIN_IN_TURN, PRIORITY = 10, 5, -10


@dataclass(frozen=True, slots=True)
class Options:
    """Our server beside vLLM's."""

    trace: Path | None = None
    """The Azure conversation trace; without it, and with --quick, lengths are drawn at random."""
    model: str = "llama-120m"
    """Folder of $PENSTOCK_PEERS/models."""
    rates: tuple[float, ...] = (0.5, 1.0, 1.5)
    """Requests per second."""
    num_requests: int = 40
    """Of each server at each rate, over all rounds."""
    rounds: int = 2
    """Turns of each server at each rate."""
    minutes: float | None = None
    """For everything, starts included, instead of a number of requests; at least 10 a server and rate are made."""
    vllm_batched_tokens: tuple[int, ...] = (256,)
    """Beside vLLM's default."""
    servers: tuple[str, ...] = ()
    """Labels of those to run, such as "vLLM fp32" "W8A8 1P1D"; by default all."""
    threads: int = 2
    seed: int = 0
    quick: bool = False
    """Within 50 s: the embedded model, ours alone, one rate."""
    output: Path | None = None
    """A file for the results."""
    json: bool = False


@dataclass(slots=True)
class Bench:
    """Takes turns; `cells` collects the records by label and rate."""

    options: Options
    specs: Sequence[ServerSpec]
    say: Callable[[str], None]
    rows: Sequence[TraceRow] = ()
    """Lengths are drawn from these; without them, at random."""
    begun_s: float = field(default_factory=time.perf_counter)
    cells: Cells = field(default_factory=dict)
    lags_s: list[float] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)
    start_s: dict[str, float] = field(default_factory=dict)

    def run(self) -> None:
        with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
            kept = {spec.label: server for spec, server in self._started(Path(folder), stack)}
            counts = self._counts()
            rounds = max(1, min(self.options.rounds, *(count // MIN_IN_TURN for count in counts.values())))
            for number in range(rounds):
                part = {rate: count // rounds + (number < count % rounds) for rate, count in counts.items()}
                for spec in self.specs:
                    if spec.label not in self.failures:
                        self._turn(spec, kept.get(spec.label), Path(folder), number, part)

    def _started(self, folder: Path, stack: ExitStack) -> Iterator[tuple[ServerSpec, Server]]:
        """Those that are kept, one after the other; each stands still when it is ready."""
        for spec in self.specs:
            if not spec.keep:
                continue
            server = stack.enter_context(Server(spec, folder / f"{spec.label}.log"))
            try:
                self.start_s[spec.label] = server.wait_ready()
            except EngineError as error:
                self._fail(spec, error, server)
                continue
            self.say(f"{spec.label}: ready after {self.start_s[spec.label]:.0f} s")
            server.pause()
            yield spec, server

    def _counts(self) -> dict[float, int]:
        """Requests of each server by rate. With a limit of time every rate gets an equal share of what is left."""
        options = self.options
        if options.minutes is None:
            return dict.fromkeys(options.rates, options.num_requests)
        specs = [spec for spec in self.specs if spec.label not in self.failures]
        starts = options.rounds * START_S * sum(not spec.keep for spec in specs)
        turns = options.rounds * len(specs) * len(options.rates)
        left_s = options.minutes * 60 - (time.perf_counter() - self.begun_s) - starts - turns * TAIL_S
        each_s = left_s / max(1, len(specs) * len(options.rates))
        counts = {rate: max(MIN_REQUESTS, int(each_s * rate)) for rate in options.rates}
        self.say(", ".join(f"{count} requests at {rate:g}/s" for rate, count in counts.items()))
        return counts

    def _turn(self, spec: ServerSpec, kept: Server | None, folder: Path, number: int, counts: dict[float, int]) -> None:
        with ExitStack() as stack:
            server = kept or stack.enter_context(Server(spec, folder / f"{spec.label}.log"))
            try:
                if kept:
                    kept.resume()
                else:
                    self.start_s[spec.label] = server.wait_ready()
                self._load(server, self._plans(number, WARM_UP, 4.0, warm_up=True))
                for rate, count in counts.items():
                    records = self._load(server, self._plans(number, count, rate))
                    failed = sum(bool(record.error) for record in records)
                    self.cells.setdefault((spec.label, rate), []).extend(records)
                    self.say(f"{spec.label} at {rate:g}/s: {len(records)} requests, {failed} failed")
            except EngineError as error:
                self._fail(spec, error, server)
            if kept:
                kept.pause()

    def _plans(self, number: int, count: int, rate: float, *, warm_up: bool = False) -> list[Plan]:
        """The same for every server. Warm-ups have prompts of their own."""
        seed = self.options.seed + 1000 * number + (500 if warm_up else 0)
        if not self.rows:
            plans = [Plan(i, 0.0, *lengths) for i, lengths in enumerate(random_pairs(count, seed))]
        else:
            scale = Scale(inputs=SCALE, outputs=SCALE, max_inputs=MAX_INPUTS, max_outputs=MAX_OUTPUTS)
            chosen = np.random.default_rng(seed).choice(len(self.rows), count, replace=False)
            plans = [scale.plan(i, self.rows[row]) for i, row in enumerate(chosen)]
        return at_rate(plans, rate, 1.0, seed)

    def _load(self, server: Server, plans: Sequence[Plan]) -> list[Record]:
        vocab_size = 1000 if self.options.quick else VOCAB_SIZE
        shape = Shape(SERVED_NAME, Prompts(vocab_size, self.options.seed), extra_body=EXTRA_BODY)
        url = Url.parse(server.base_url, "/v1/completions")
        with first_in_line():
            load = asyncio.run(Driver(OpenAIBackend(url, shape), timeout_s=120.0).run(plans))
        self.lags_s.extend(load.lags_s)
        return [*load.records]

    def _fail(self, spec: ServerSpec, error: EngineError, server: Server) -> None:
        self.failures[spec.label] = str(error)
        self.say(str(error))
        server.close()


@contextmanager
def first_in_line() -> Iterator[None]:
    """This process goes before others, where it may say so: the servers have all cores, and what waits for one of them
    is theirs, not the client's."""
    before = os.getpriority(os.PRIO_PROCESS, 0)
    with suppress(PermissionError):
        os.setpriority(os.PRIO_PROCESS, 0, PRIORITY)
    try:
        yield
    finally:
        with suppress(PermissionError):
            os.setpriority(os.PRIO_PROCESS, 0, before)


def random_pairs(count: int, seed: int) -> list[tuple[int, int]]:
    """Lengths of prompts and outputs."""
    inputs, outputs = (random_lengths(count, mean, 0.9, [seed, mean]) for mean in (200, 32))
    return [*zip(inputs, outputs, strict=True)]


def specs_of(options: Options) -> list[ServerSpec]:
    """Labels that begin with vLLM are the peer's."""
    if options.quick:
        return [penstock_server(f"tiny {kind}", TINY, mixed=kind == "mixed") for kind in ("1P1D", "mixed")]
    peers = Peers(Path(os.environ[VARIABLE]), options.threads)
    model = peers.model(options.model)
    int8 = ("--quantization", "int8")
    specs = []
    if (python := peers.python("vllm")) is not None:
        quantized = peers.w8a8(model)
        for name, folder in (("fp32", model), ("W8A8", quantized)):
            for tokens in (None, *options.vllm_batched_tokens):
                label = f"vLLM {name}" + (f" {tokens}" if tokens else "")
                specs.append(vllm_server(label, python, folder, peers.folder / "cache", options.threads, tokens))
    for name, flags in (("fp32", ()), ("W8A8", int8)):
        for kind in ("1P1D", "mixed"):
            specs += [penstock_server(f"{name} {kind}", model, mixed=kind == "mixed", flags=flags)]
    return [spec for spec in specs if not options.servers or spec.label in options.servers]


def result_of(bench: Bench) -> dict[str, Any]:
    """Everything that is worth keeping, in JSON values."""
    options = bench.options
    lags_ms = np.asarray(bench.lags_s or [0.0]) * 1e3
    servers: dict[str, Any] = {}
    for (label, rate), records in bench.cells.items():
        done = [record for record in records if not record.error]
        servers.setdefault(label, {})[f"{rate:g}"] = {
            "requests": len(records),
            "failed": len(records) - len(done),
            "prompt_tokens": sum(record.num_inputs for record in done),
            "output_tokens": sum(record.num_outputs for record in done),
            "messages": sum(len(record.tokens_s) for record in done),
            **{name: round(value, 2) for name, value in summary(records).items()},
        }
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": machine(),
        "load": {
            "trace": options.trace.name if options.trace and not options.quick else None,
            "scale": SCALE,
            "max_inputs": MAX_INPUTS,
            "max_outputs": MAX_OUTPUTS,
            "rates": list(options.rates),
            "seed": options.seed,
            "rounds": options.rounds,
        },
        "commands": {spec.label: described(spec) for spec in bench.specs},
        "start_s": {label: round(value, 1) for label, value in bench.start_s.items()},
        "unit": "ms",
        "servers": servers,
        "verdicts": [{**asdict(each), "met": each.met} for each in verdicts(bench.cells)],
        "failures": bench.failures,
        "client_lag_ms": {"p99": float(np.percentile(lags_ms, 99)), "max": float(lags_ms.max())},
    }


def main() -> int:
    """0 where every server ran and no request failed."""
    options = tyro.cli(Options, prog="python -m benchmarks.serving", description=__doc__)
    if options.quick:
        options = replace(options, rates=(2.0,), num_requests=16, rounds=1, minutes=None)
    elif VARIABLE not in os.environ:
        print(f"serving: ${VARIABLE} must name the folder of the peers, or give --quick", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or servers that stand still would be left behind
    console = Console(width=160)
    begun_s = time.perf_counter()

    def say(text: str) -> None:
        print(f"{time.perf_counter() - begun_s:6.1f} s  {text}", file=sys.stderr, flush=True)

    try:
        rows = read_trace(options.trace) if options.trace and not options.quick else []
    except ConfigError as error:
        print(f"serving: {error}", file=sys.stderr)
        return 2
    if library() is None:  # builds them, before anybody's time runs
        print("serving: the C++ kernels can't be built: torch's would be measured", file=sys.stderr)
        return 2
    bench = Bench(options, specs_of(options), say, rows)
    try:
        bench.run()
    finally:  # what was measured is kept, also where the rest was cut short
        result = result_of(bench)
        if options.output:
            options.output.write_text(json.dumps(result, indent=1) + "\n")
    if options.json:
        print(json.dumps(result))
    else:
        print_cells(bench.cells, console)
        if found := verdicts(bench.cells):
            print_verdicts(found, console)
        console.print(f"This client woke up late by p99 {result['client_lag_ms']['p99']:.1f} ms.")
    failed = any(record.error for records in bench.cells.values() for record in records)
    return 1 if failed or bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
