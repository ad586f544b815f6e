"""What clients felt, server by server and rate by rate, and whether it is what we want to show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.serve.records import Record
from benchmarks.serve.report import values_ms

Cells = dict[tuple[str, float], list[Record]]
"""By label of the server and rate."""

COLUMNS: Sequence[tuple[str, str, float]] = (
    ("TTFT p50", "ttft", 50),
    ("TTFT p99", "ttft", 99),
    ("ITL p50", "itl", 50),
    ("ITL p95", "itl", 95),
    ("ITL p99", "itl", 99),
    ("longest gap p50", "max_itl", 50),
    ("longest gap p90", "max_itl", 90),
    ("E2E p50", "e2el", 50),
)
"""Name, metric, percentile; all in ms."""
EVERY_COLUMN = ("TTFT p50", "TTFT p99", "ITL p50", "ITL p99", "longest gap p50", "longest gap p90", "E2E p50")
MAIN_RATE = 1.0
PEER = "vLLM"


@dataclass(frozen=True, slots=True)
class Verdict:
    """`ratio` is theirs by ours, so above 1 is better for us; met where it is at least `target`."""

    what: str
    ours_ms: float
    theirs_ms: float
    peer: str
    ratio: float
    target: float

    @property
    def met(self) -> bool:
        return self.ratio >= self.target


def summary(records: Iterable[Record]) -> dict[str, float]:
    """Every column that the records have, in ms."""
    records = [*records]
    values = {metric: values_ms(records, metric) for metric in dict.fromkeys(metric for _, metric, _ in COLUMNS)}
    return {name: float(np.percentile(values[m], percent)) for name, m, percent in COLUMNS if values[m]}


def verdicts(cells: Cells) -> list[Verdict]:
    """What issue and README promise, of the cells that were measured. A server with failed requests is not compared."""
    found: list[Verdict] = []
    rates = sorted({rate for _, rate in cells})
    for rate in rates:
        figures = {
            label: summary(records)
            for (label, at_rate), records in cells.items()
            if at_rate == rate and records and not any(record.error for record in records)
        }
        if rate == MAIN_RATE:
            targets = {"ITL p99": 5.0, "longest gap p50": 5.0, "longest gap p90": 5.0, "E2E p50": 1 / 1.2}
            found += _against(figures, "fp32 1P1D", _peers(figures, "fp32"), targets, rate)
        int8 = _peers(figures, "W8A8") or _peers(figures, "fp32")
        found += _against(figures, "W8A8 1P1D", int8, dict.fromkeys(EVERY_COLUMN, 1.0), rate)
    return found


def _peers(figures: Mapping[str, object], precision: str) -> list[str]:
    return [label for label in figures if label.startswith(PEER) and precision in label]


def _against(
    figures: Mapping[str, Mapping[str, float]],
    ours: str,
    peers: Sequence[str],
    targets: Mapping[str, float],
    rate: float,
) -> list[Verdict]:
    """Column by column against the peer that is best in it."""
    if ours not in figures or not peers:
        return []
    found = []
    for column, target in targets.items():
        best = min(peers, key=lambda peer: figures[peer].get(column, float("inf")))
        mine, theirs = figures[ours].get(column), figures[best].get(column)
        if mine and theirs:
            found.append(Verdict(f"{ours} at {rate:g}/s, {column}", mine, theirs, best, theirs / mine, target))
    return found


def print_cells(cells: Cells, console: Console) -> None:
    for rate in sorted({rate for _, rate in cells}):
        table = Table(f"{rate:g}/s, ms", "n", "failed", *(name for name, _, _ in COLUMNS), box=None)
        for (label, at_rate), records in cells.items():
            if at_rate != rate:
                continue
            figures = summary(records)
            failed = sum(bool(record.error) for record in records)
            numbers = [f"{figures[name]:.1f}" if name in figures else "-" for name, _, _ in COLUMNS]
            table.add_row(label, str(len(records)), str(failed), *numbers)
        console.print(table)


def print_verdicts(found: Iterable[Verdict], console: Console) -> None:
    table = Table("", "ours ms", "theirs ms", "best peer", "theirs / ours", "target", "", box=None)
    for each in found:
        mark = "[green]met[/]" if each.met else "[red]missed[/]"
        times = f"{each.ours_ms:.1f}", f"{each.theirs_ms:.1f}"
        table.add_row(each.what, *times, each.peer, f"{each.ratio:.2f}", f"{each.target:.2f}", mark)
    console.print(table)
