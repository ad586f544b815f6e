"""A load's report for people: tables, progress, and two runs side by side."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bar
from rich.table import Table

from benchmarks.serve.driver import Progress
from benchmarks.serve.report import MAX_LAG_S, METRICS, Json
from core.errors import ConfigError

FEW_MESSAGES = 0.95
"""Of tokens; with less, users should know that gaps are not those of tokens."""


def print_report(result: Json, console: Console, metrics: Sequence[str], percentiles: Sequence[float]) -> None:
    console.print(
        f"[b]{result['completed']} requests in {result['duration']:.1f} s[/b], {result['failed']} failed: "
        f"{result['request_throughput']:.2f} requests/s, {result['output_throughput']:.1f} output tokens/s, "
        f"{result['total_token_throughput']:.1f} tokens/s, at most {result['max_concurrent_requests']} at once"
    )
    for error, count in result["errors"].items():
        console.print(f"  {count} x {error}", markup=False)
    names = [f"p{percentile:g}" for percentile in percentiles]
    table = Table("ms", "mean", *names, "max", box=None)
    for metric in metrics:
        cells = [_cell(result[f"{name}_{metric}_ms"]) for name in ("mean", *names, "max")]
        table.add_row(METRICS[metric], *cells)
    console.print(table)
    if (messages := result["total_messages"]) < FEW_MESSAGES * (tokens := result["total_output_tokens"]):
        told = f"{tokens} tokens came in {messages} messages"
        console.print(f"[yellow]{told}: gaps are between messages, not between tokens.[/]")
    if "request_goodput" in result:
        slos = " ".join(f"{name}:{limit:g}" for name, limit in result["goodput_slos_ms"].items())
        attained = f"{result['slo_attainment']:.1%} of the requests"
        console.print(f"Goodput {result['request_goodput']:.2f} requests/s within {slos}: {attained}")
    client = result["client"]
    told = f"p99 {client['p99_lag_ms']:.2f} ms, longest {client['max_lag_ms']:.2f} ms"
    if client["trustworthy"]:
        console.print(f"[dim]This client woke up late by {told}.[/dim]")
    else:
        limit = f"over {MAX_LAG_S * 1e3:g} ms"
        console.print(f"[b yellow]This client was too busy: it woke up late by {told} ({limit}). Don't trust it.[/]")


def print_comparison(a: Json, b: Json, console: Console) -> None:
    """B beside A; below 1 is better in B for times, above 1 for rates."""
    names = [str(each.get("label") or default) for each, default in ((a, "A"), (b, "B"))]
    table = Table("", *names, "B / A", box=None)
    rates = ("completed", "failed", "request_throughput", "output_throughput", "request_goodput", "slo_attainment")
    for key in (*rates, *_timing_keys(a, b)):
        if key in a and key in b:
            ratio = b[key] / a[key] if a[key] and b[key] is not None else None
            table.add_row(key, _cell(a[key]), _cell(b[key]), "-" if ratio is None else f"{ratio:.3f}")
    console.print(table)
    for key in ("num_prompts", "request_rate", "trace", "seed", "max_concurrency"):
        if a.get(key) != b.get(key):
            console.print(f"[yellow]The loads differ: {key} is {a.get(key)} and {b.get(key)}.[/]")


def _timing_keys(a: Json, b: Json) -> list[str]:
    """In the order of the metrics, those that both have."""
    stats = ("mean", *dict.fromkeys(_percentile_names(a)), "max")
    return [key for metric in METRICS for stat in stats if (key := f"{stat}_{metric}_ms") in a and key in b]


def _percentile_names(result: Json) -> Iterator[str]:
    for key in result:
        name = key.partition("_")[0]
        if name[:1] == "p" and name[1:].replace(".", "").isdigit():
            yield name


def read_result(path: Path) -> Json:
    """`ConfigError` where it is no file that this tool wrote."""
    try:
        result: Any = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError("result", str(path), f"can't be read: {error.strerror}") from error
    except ValueError as error:
        raise ConfigError("result", str(path), f"must be a result of penstock bench serve: {error}") from error
    if not isinstance(result, dict) or "request_throughput" not in result:
        raise ConfigError("result", str(path), "must be a result of penstock bench serve")
    return result


def _cell(value: float | None) -> str:
    return "-" if value is None else f"{value:,.3g}" if abs(value) < 10 else f"{value:,.1f}"


@contextmanager
def progress_bar(total: int, *, hidden: bool) -> Iterator[Any]:
    """A callback for the driver. Drawn at most ten times in a second, by whoever reports: no thread of its own."""
    columns = (
        TextColumn("{task.fields[sent]} sent"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[failed]} failed"),
        TimeElapsedColumn(),
    )
    console = Console(stderr=True)
    with Bar(*columns, console=console, auto_refresh=False, disable=hidden or not console.is_terminal) as bar:
        task = bar.add_task("", total=total, sent=0, failed=0)
        drawn_s = 0.0

        def on_progress(progress: Progress) -> None:
            nonlocal drawn_s
            bar.update(task, completed=progress.num_done, sent=progress.num_sent, failed=progress.num_failed)
            now_s = bar.get_time()
            if now_s - drawn_s > 0.1 or progress.num_done == total:
                drawn_s = now_s
                bar.refresh()

        yield on_progress
