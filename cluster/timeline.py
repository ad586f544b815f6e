"""One request's trace on a terminal: its stages as a Gantt chart, and why it went where it did."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
        if attempt.waited_for:
            console.print(f"  waited    as {escape(in_words(attempt.waited_for))}")
        console.print(f"  policy    {escape(attempt.policy)}: {escape(in_words(attempt.reasons))}")
        if attempt.forecast is not None:
            console.print(f"  foreseen  {foreseen(attempt, trace)}")
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


REASONS = {
    "local": "read and written by one worker",
    "disaggregated": "read by one worker, written by another",
    "least_loaded": "predicted to be done first",
    "next_in_turn": "next in turn",
    "better_of_two": "the better of two that were drawn",
    "none_drawn_had_room": "none of those drawn had room, so where it would be done first",
    "prefix_cached": "cached prefix and queue together cost least",
    "no_prefix_cached": "nobody has any of the prompt, so where it would be done first",
    "no_holder_has_room": "those that have some of the prompt have no room, so where it would be done first",
    "cheaper_here": "reading it where it decodes costs less than sending it there",
    "cached_here": "the worker that decodes has most of the prompt already",
    "no_pair_has_room": "no pair of workers had room for it",
    "asked_for": "as the request asked",
    "holders_busy": "waiting for those that have some of the prompt would cost more than it saves",
    "no_slo": "no target is set, so where it would be done first",
    "tightest_fit": "the fullest that still meets the targets",
    "slo_out_of_reach": "none meets the targets, so where it would be done first",
    "cheapest": "the cheapest that is fast enough",
    "none_cheap_is_fast_enough": "none that is cheap is fast enough, so where it would be done first",
    "own_pools": "its pools can take it in time",
    "tokens_overflow": "decode workers are full: a mixed one helps out",
    "prompts_overflow": "prefill workers are busy: a mixed one helps out",
    "all_overflow": "both pools are full: mixed workers help out",
    "moved": "went on decoding on another worker, with its K and V",
    "draining": "the worker that it was on drains",
    "avoided_failed_worker": "a worker that failed it was left out",
    "refused": "a worker had refused it",
    "no_prefill_credit": "prefill workers had all they may have",
    "no_decode_credit": "decode workers had all they may have",
    "no_decode_blocks": "no decode worker had blocks for it",
    "no_pair": "no pair with room was connected",
    "no_route": "no worker or pair was there",
    "too_long": "no worker could hold it",
}
"""The reasons of `router/policies` for people; what is missing here is shown as it is."""


def in_words(reasons: Sequence[str]) -> str:
    return "; ".join(f"{REASONS[reason]} ({reason})" if reason in REASONS else reason for reason in reasons)


def foreseen(attempt: AttemptTrace, trace: RequestTrace) -> str:
    """The forecast that the choice was made by, beside what came of it."""
    forecast = attempt.forecast
    assert forecast is not None
    text = f"first token after {forecast.ttft_s * 1e3:.1f} ms"
    if attempt.first_token_s is not None:
        text += f" (came after {(attempt.first_token_s - attempt.placed_s) * 1e3:.1f} ms)"
    text += f", {forecast.itl_s * 1e3:.1f} ms between tokens, end after {forecast.finish_s * 1e3:.1f} ms"
    if attempt is trace.attempts[-1] and trace.outcome in ("stop", "length"):
        text += f" (came after {(trace.elapsed_s - attempt.placed_s) * 1e3:.1f} ms)"
    cached = [
        f"{name} has {count} tokens of it"
        for name, count in (
            (attempt.prefill_worker, forecast.num_cached_prefill),
            (attempt.decode_worker, forecast.num_cached_decode),
        )
        if count
    ]
    return escape("; ".join([text, *dict.fromkeys(cached)]))


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
