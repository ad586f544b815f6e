"""The engine beside its peers, on this machine, in one run.

    PENSTOCK_PEERS=FOLDER python -m benchmarks.engine [--quick] [--json] [--models NAME ...] [--rounds N]

First the ceilings of the machine (`ceilings`), then every engine in a process of its own with the same number of
threads, one at a time, the others stopped; they take turns at the same prompts (`comparison`), and a row has the
medians (`rows`). Prefix caches are off. What is measured is said in `workloads.Measure`; where the peers come from, in
`peer_engines`. Without peers, and with --quick, transformers alone stands beside the engine.

With --json all that it prints is one object, {"rows": [...], "missing": [...]}: rows as `rows.Row` says, and what could
not be measured, with the reason. The result file also holds all samples, the ceilings, and how often engines agreed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import comparison_rows as labels
from benchmarks import own_rows
from benchmarks.ceilings import Ceilings, measure_ceilings, read_rate_now
from benchmarks.comparison import Comparison, Measured
from benchmarks.comparison_rows import Missing, comparison_rows, read_rows
from benchmarks.engine_process import EngineError, EngineSpec, own_spec
from benchmarks.machine import machine
from benchmarks.model_cost import ModelCost
from benchmarks.peer_engines import VARIABLE, Peers, transformers_spec
from benchmarks.rows import Row
from benchmarks.speculation import speculation_rows
from benchmarks.workloads import QUICK_WORKLOADS, WORKLOADS, Measure

RESULTS = Path(__file__).parent / "results" / "engine.json"
MODELS = ("llama-120m", "qwen3moe-300m")
FULL_S, QUICK_S = 1140.0, 32.0
NUM_STARTS = 3
Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Options:
    models: tuple[str, ...] = MODELS
    num_rounds: int = 5
    num_threads: int = 2
    quick: bool = False
    limit_s: float = FULL_S
    """Nothing is begun after this, but for the first of what every model is asked to do."""
    peers: Path | None = None

    @classmethod
    def of(
        cls,
        *,
        models: Sequence[str],
        num_rounds: int,
        num_threads: int,
        quick: bool,
        limit_s: float | None = None,
    ) -> Options:
        """The folder of the peers is taken from the environment."""
        if limit_s is None:
            limit_s = QUICK_S if quick else FULL_S
        folder = os.environ.get(VARIABLE)
        return cls(tuple(models), num_rounds, num_threads, quick, limit_s, Path(folder) if folder else None)


@dataclass(slots=True)
class Report:
    ceilings: Ceilings
    rows: list[Row] = field(default_factory=list)
    missing: list[Missing] = field(default_factory=list)
    models: dict[str, Measured] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        """The object of --json."""
        return {"rows": [asdict(row) for row in self.rows], "missing": [asdict(each) for each in self.missing]}

    def file(self, options: Options) -> dict[str, Any]:
        return {
            "command": f"python -m benchmarks.engine{' --quick' if options.quick else ''}",
            "date": date.today().isoformat(),
            "machine": machine(),
            "threads": options.num_threads,
            "measures": {measure.name.lower(): measure.value for measure in Measure},
            "ceilings": asdict(self.ceilings),
            **self.summary(),
            "models": {name: model_file(measured) for name, measured in self.models.items()},
        }


def model_file(measured: Measured) -> dict[str, Any]:
    samples: dict[str, dict[str, list[float]]] = {}
    for (workload, engine), rates in measured.tokens_per_s.items():
        samples.setdefault(workload, {})[engine] = [round(rate, 2) for rate in rates]
    agreement = {
        f"{ours} and {peer}": "{} of {} sequences alike".format(*counts)
        for ours, peer in ((labels.OURS_FLOAT32, labels.VLLM_FLOAT32), (labels.OURS_FLOAT32, labels.TRANSFORMERS))
        if (counts := measured.agreement(ours, peer))[1]
    }
    return {
        "engines": measured.names,
        "notes": measured.notes,
        "failures": measured.failures,
        "tokens_per_s": samples,
        "start_s": dict(measured.start_s),
        "load_s": dict(measured.load_s),
        "read_bytes_per_s": measured.read_bytes_per_s,
        "agreement": agreement,
    }


class Bench:
    def __init__(self, options: Options, log_folder: Path, say: Callable[[str], None], clock: Clock) -> None:
        self._options = options
        self._logs = log_folder
        self._say = say
        self._clock = clock
        self._deadline_s = clock() + options.limit_s
        self._peers = None if options.peers is None else Peers(options.peers, options.num_threads)

    def run(self, report: Report) -> None:
        """Rows are added to the report as they come."""
        options = self._options
        num_rounds = 1 if options.quick else 5
        self._take(report, "penstock-tiny", lambda: [own_rows.tiny_row(self._logs / "tiny.log", num_rounds)])
        folders = list(self._folders(report))
        for i, folder in enumerate(folders):
            left_s = self._deadline_s - self._clock()
            self._model(report, folder, self._clock() + left_s / (len(folders) - i))
        if options.quick and self._clock() > self._deadline_s:
            report.missing.append(Missing("penstock-tiny, speculation", "the time was up before it could start"))
        else:
            num_files = 2 if options.quick else 6
            self._take(report, "speculation", lambda: speculation_rows(self._logs, num_rounds, num_files))

    def _folders(self, report: Report) -> Iterator[Path]:
        """Of the models; the embedded one where there are no peers."""
        if self._peers is None:
            report.missing.append(Missing("every row beside vLLM and llama.cpp", f"${VARIABLE} is not set"))
            yield own_rows.TINY
            return
        for name in self._options.models[: 1 if self._options.quick else None]:
            if (folder := self._peers.model(name)).exists():
                yield folder
            else:
                report.missing.append(Missing(name, f"there is no models/{name} in ${VARIABLE}"))

    def _model(self, report: Report, folder: Path, deadline_s: float) -> None:
        options, quick = self._options, self._options.quick
        own_rows.read_once(folder)
        cost = ModelCost.from_folder(folder)
        workloads = QUICK_WORKLOADS if quick else WORKLOADS
        if not quick:
            self._take(
                report,
                folder.name,
                lambda: [own_rows.memory_row(folder, self._logs / "memory.log", options.num_threads)],
            )
        vocab_size = min(7000, cost.vocab_size)
        comparison = Comparison(
            self._specs(folder, report.missing),
            vocab_size,
            self._logs,
            self._say,
            in_time=lambda: self._clock() < deadline_s,
            read_rate=None if quick else partial(read_rate_now, options.num_threads, self._clock),
        )
        with comparison.started():
            if not quick:
                comparison.warm_up(workloads)
            self._turns(comparison, deadline_s)
        measured = report.models[folder.name] = comparison.measured
        for _ in range(0 if quick else NUM_STARTS - 1):
            comparison.restart(self._own(labels.OURS_FLOAT32, folder))
        for label in (labels.VLLM_FLOAT32, labels.VLLM_INT8, labels.OURS_INT8_LIKE_VLLM) if quick else ():
            measured.failures[label] = "a quick run leaves it out"
        rows, missing = comparison_rows(folder.name, measured, workloads, cost, report.ceilings)
        if own_rows.is_large(folder):
            rows += read_rows(folder.name, measured, workloads, cost, report.ceilings)
        load_s = measured.load_s.get(labels.OURS_FLOAT32)
        if load_s and own_rows.is_large(folder):
            rows.append(own_rows.load_row(folder, load_s))
        report.rows += rows
        report.missing += missing

    def _turns(self, comparison: Comparison, deadline_s: float) -> None:
        """As many as were asked for and as the time allows, but one. Those for the record sit every other one out."""
        workloads = QUICK_WORKLOADS if self._options.quick else WORKLOADS
        rivals = (labels.OURS_FLOAT32, labels.OURS_INT8, labels.VLLM_FLOAT32, labels.VLLM_INT8)
        took_s: list[float] = []
        for number in range(1 if self._options.quick else self._options.num_rounds):
            start_s = self._clock()
            if took_s and start_s + statistics.mean(took_s) > deadline_s:
                self._say(f"the time is up after {number} turns")
                return
            only = rivals if number % 2 else None
            comparison.turn(number, workloads, only=only)
            took_s.append(self._clock() - start_s)
            self._say(f"turn {number + 1} took {took_s[-1]:.0f} s")

    def _specs(self, folder: Path, missing: list[Missing]) -> list[EngineSpec]:
        """Of the engines that are here; why others are not, where that is an error, goes to `missing`."""
        options, peers = self._options, self._peers
        specs = [self._own(labels.OURS_FLOAT32, folder), self._own(labels.OURS_INT8, folder, quantization="int8")]
        makers: list[Callable[[Path], EngineSpec | None]] = []
        if peers is not None and not options.quick:
            like_vllm = {"quantization": "int8", "quantize_lm_head": False}
            specs.append(self._own(labels.OURS_INT8_LIKE_VLLM, folder, **like_vllm))
            makers += [peers.vllm_float32, peers.vllm_int8]
        if peers is not None:
            makers.append(peers.llama_cpp)
        for make in makers:
            try:
                specs += [spec] if (spec := make(folder)) is not None else []
            except (OSError, subprocess.SubprocessError) as error:  # weights can't be written in the peer's layout
                missing.append(Missing(f"{folder.name}, a peer's checkpoint", type(error).__name__))
        return [*specs, transformers_spec(folder, options.num_threads)]

    def _own(self, label: str, folder: Path, **config: object) -> EngineSpec:
        return own_spec(label, folder, own_rows.ROOT, num_threads=self._options.num_threads, **config)

    def _take(self, report: Report, name: str, measure: Callable[[], list[Row]]) -> None:
        self._say(f"{name} alone")
        try:
            report.rows += measure()
        except EngineError as error:
            report.missing.append(Missing(name, str(error)))


def run(options: Options, output: Path | None) -> Report:
    """Measure, tell of the progress on stderr, and write the result file where there is to be one."""
    start_s = time.perf_counter()

    def say(text: str) -> None:
        print(f"[{time.perf_counter() - start_s:5.0f} s] {text}", file=sys.stderr, flush=True)

    log_folder = Path(tempfile.mkdtemp(prefix="penstock-bench-"))
    say(f"logs of the engines: {log_folder}")
    bench = Bench(options, log_folder, say, time.perf_counter)
    say("ceilings")
    report = Report(measure_ceilings(options.num_threads, quick=options.quick))
    try:
        bench.run(report)
    finally:  # what there is of a run that was broken off
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(report.file(options), indent=2) + "\n")
    say("done")
    return report


def print_report(report: Report) -> None:
    table = Table("", "value", "unit", "peer", "ratio", "target", "", box=None)
    for row in report.rows:
        peer, ratio = ("" if v is None else f"{v:,.4g}" for v in (row.peer, row.ratio))
        target = f"{row.target:.3g}" if row.target else ""
        verdict = ("[green]ok" if row.ok else "[red]missed") if row.target else ""
        table.add_row(row.name, f"{row.value:,.4g}", row.unit, peer, ratio, target, verdict)
    console = Console()
    console.print(table)
    for each in report.missing:
        console.print(f"not measured: {each.name}: {each.reason}", markup=False)


def command(options: Options, output: Path | None, *, as_json: bool) -> int:
    report = run(options, output)
    if as_json:
        print(json.dumps(report.summary()))
    else:
        print_report(report)
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="within 50 s: one model, one short turn, no vLLM")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--models", nargs="+", default=MODELS, help=f"folders of ${VARIABLE}/models")
    parser.add_argument("--rounds", type=int, default=5, help="at most; fewer where the time is up")
    parser.add_argument("--threads", type=int, default=2, help="of every engine")
    parser.add_argument("--limit-s", type=float, help=f"begin nothing after this: {FULL_S:g}, {QUICK_S:g} with --quick")
    parser.add_argument("--output", type=Path, help=f"default: {RESULTS.name} in benchmarks/results, none with --quick")
    given = parser.parse_args(arguments)
    options = Options.of(
        models=given.models,
        num_rounds=given.rounds,
        num_threads=given.threads,
        quick=given.quick,
        limit_s=given.limit_s,
    )
    return command(options, given.output or (None if given.quick else RESULTS), as_json=given.json)


if __name__ == "__main__":
    raise SystemExit(main())
