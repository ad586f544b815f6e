"""One request's trace on a terminal: its stages as a Gantt chart, and why it went where it did."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from penstock import AttemptTrace, RequestTrace

MIN_BAR_WIDTH = 16
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_STYLES = {
    "queue": "yellow",
    "reserve": "magenta",
    "prefill": "blue",
    "transfer_hidden": "cyan",
    "transfer_exposed": "red",
    "commit": "magenta",
    "commit_wait": "red",
    "first_decode_step": "green",
    "decode": "green",
}
_INFERRED = "~ measured on the worker's clock: how long is exact, where is inferred, with so much room as ± tells"


def print_timeline(trace: RequestTrace, console: Console) -> None:
    console.print(headline(trace))
    total_s = max([trace.elapsed_s, *(end for span in trace.spans if (end := span.end_s) is not None)], default=0.0)
    names = max((len(span.name) + len(span.worker) for span in trace.spans), default=0)
    width = max(MIN_BAR_WIDTH, console.width - names - 40)
    table = Table(box=None, pad_edge=False)
    table.add_column("stage")
    table.add_column("worker")
    table.add_column("start ms", justify="right")
    table.add_column("ms", justify="right")
    table.add_column("±", justify="right")
    table.add_column(f"0 to {total_s * 1e3:.1f} ms", no_wrap=True, min_width=width)
    for span in trace.spans:
        end_s = trace.elapsed_s if span.end_s is None else span.end_s
        bar_of_span = bar(span.start_s, end_s, total_s, width)
        table.add_row(
            span.name + (f" #{span.attempt}" if len(trace.attempts) > 1 else ""),
            escape(span.worker),
            f"{span.start_s * 1e3:.1f}",
            f"{(end_s - span.start_s) * 1e3:.1f}" + ("…" if span.end_s is None else ""),
            "" if span.slack_s is None else f"~{span.slack_s * 1e3:.1f}",
            f"[{_STYLES.get(span.name, 'white')}]{bar_of_span}[/]",
        )
    console.print(table)
    if any(span.slack_s is not None for span in trace.spans):
        console.print(f"[dim]{_INFERRED}[/]")
    for line in _remarks(trace):
        console.print(line)


def print_reasons(trace: RequestTrace, console: Console) -> None:
    console.print(headline(trace))
    if not trace.attempts:
        console.print(f"no workers were chosen: it waited {trace.elapsed_s * 1e3:.1f} ms in the queue")
    for attempt in trace.attempts:
        console.print(f"[b]{placement_line(attempt)}[/]")
        console.print(f"  because   {escape(', '.join(attempt.reasons)) or 'no reason was kept'}")
        console.print(f"  it was    {attempt.outcome}" + (f": {escape(attempt.detail)}" if attempt.detail else ""))
        if attempt.kv_bytes is not None:
            console.print(f"  carried   {carried(attempt)}")
    if trace.num_forgotten_attempts:
        console.print(f"{trace.num_forgotten_attempts} more attempts, after the first, were not kept")


def headline(trace: RequestTrace) -> str:
    took = (
        f"for {trace.elapsed_s:.3f} s" if trace.outcome in ("queued", "running") else f"after {trace.elapsed_s:.3f} s"
    )
    detail = f" ({escape(trace.detail)})" if trace.detail else ""
    return (
        f"[b]{escape(trace.request_id)}[/]  {trace.outcome} {took}{detail}  "
        f"{trace.num_prompt_tokens} prompt + {trace.num_output_tokens} output tokens"
    )


def placement_line(attempt: AttemptTrace) -> str:
    where = escape(attempt.prefill_worker)
    if attempt.decode_worker != attempt.prefill_worker:
        where += f" → {escape(attempt.decode_worker)}"
    return f"attempt {attempt.attempt}, at {attempt.placed_s * 1e3:.1f} ms: {attempt.num_tokens} tokens to {where}"


def carried(attempt: AttemptTrace) -> str:
    """Bytes, speed while the channel was at it, and what computing hid of it."""
    text = f"{(attempt.kv_bytes or 0) / 2**20:.2f} MiB"
    if attempt.transfer_s:
        exposed_s = attempt.transfer_exposed_s or 0.0
        hidden = max(0.0, 1.0 - exposed_s / attempt.transfer_s)
        text += f" at {(attempt.kv_bytes or 0) / attempt.transfer_s / 1e9:.2f} GB/s, {hidden:.0%} behind computing"
    return text


def bar(start_s: float, end_s: float, total_s: float, width: int) -> str:
    """`width` cells stand for `total_s`; a stage is at least an eighth of a cell long, so that none is unseen."""
    if total_s <= 0.0:
        return ""
    eighths = 8 * width
    first = min(eighths - 1, round(start_s / total_s * eighths))
    last = min(eighths, max(first + 1, round(end_s / total_s * eighths)))
    cell, into = divmod(first, 8)
    lead, length = " " * cell, last - first
    if into:  # there are no blocks that begin inside a cell: begin with the cell
        length += into
    return lead + "█" * (length // 8) + _EIGHTHS[length % 8].strip()


def _remarks(trace: RequestTrace) -> Iterator[str]:
    for attempt in trace.attempts:
        prefix = f"#{attempt.attempt}: " if len(trace.attempts) > 1 else ""
        if attempt.outcome in ("refused", "failed"):
            yield f"{prefix}{attempt.outcome}: {escape(attempt.detail)}"
        if attempt.kv_bytes is not None:
            yield f"{prefix}KV {carried(attempt)}"
    if trace.longest_gap_s:
        gap_ms, at_ms = trace.longest_gap_s * 1e3, trace.longest_gap_at_s * 1e3
        yield f"longest gap between tokens {gap_ms:.1f} ms, up to {at_ms:.1f} ms"
