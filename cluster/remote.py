"""The subcommands that talk to a running cluster: they load neither Ray nor torch."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from core.errors import UnavailableError, UnknownRequestError
from penstock import Client
from penstock.errors import PenstockError as ClientError

if TYPE_CHECKING:
    from benchmarks.load import Summary
    from cluster.cli import Bench, Explain, Generate, Status, Trace


def run(command: Generate | Status | Trace | Explain | Bench) -> int:
    """Run the command; the exit code. Errors of the SDK come out as ours."""
    from cluster.cli import Explain, Generate, Status, Trace

    try:
        match command:
            case Generate():
                return generate(command)
            case Status():
                return status(command)
            case Trace() | Explain():
                return request_trace(command)
            case _:
                return bench(command)
    except ClientError as error:
        raise UnavailableError(str(error)) from error


def generate(command: Generate) -> int:
    source: dict[str, Any] = (
        {"messages": [{"role": "user", "content": command.prompt}]} if command.chat else {"prompt": command.prompt}
    )
    with command.connection.client(command.target) as client:
        generation = client.generate(
            **source,
            max_tokens=command.max_tokens,
            temperature=command.temperature,
            top_p=command.top_p,
            top_k=command.top_k,
            seed=command.seed,
            stop=list(command.stop) or None,
            min_p=command.min_p,
            repetition_penalty=command.repetition_penalty,
            frequency_penalty=command.frequency_penalty,
            presence_penalty=command.presence_penalty,
            json_schema=command.json_schema,
            regex=command.regex,
            choice=command.choice or None,
            timeout_s=command.timeout_s,
        )
        texts = []
        for delta in generation:
            texts.append(delta.text)
            if not command.json:
                print(delta.text, end="", flush=True)
        if not command.json:
            print()
            return 0
        usage, stats = generation.usage, generation.stats
        answer = {
            "request_id": generation.request_id,
            "model": generation.model,
            "text": "".join(texts),
            "token_ids": generation.token_ids,
            "finish_reason": generation.finish_reason,
            "seed": generation.seed,
            "usage": asdict(usage) if usage else None,
            "stats": asdict(stats) if stats else None,
        }
        print(json.dumps(answer))
    return 0


def status(command: Status) -> int:
    """0 where at least one pair or mixed worker can serve, else 1."""
    with command.connection.client(command.target) as client:
        info = client.server_info()
    if command.json:
        print(json.dumps(asdict(info)))
    else:
        _print_status(info)
    mixed = any(worker.connected and worker.role == "mixed" for worker in info.workers)
    return 0 if mixed or any(pair.up for pair in info.pairs) else 1


def _print_status(info: Any) -> None:
    console = Console()
    console.print(
        f"[b]{info.model}[/b]  version {info.version}  up {info.uptime_s:.0f} s  "
        f"queued {info.num_queued}  running {info.num_running}"
    )
    workers = Table("worker", "role", "state", "runs", "waits", "free blocks", "device", "address", box=None)
    for w in info.workers:
        state = "draining" if w.draining else "connected" if w.connected else "lost"
        blocks = f"{w.num_free_blocks}/{w.num_blocks}"
        workers.add_row(w.worker_id, w.role, state, str(w.num_running), str(w.num_waiting), blocks, w.device, w.address)
    console.print(workers)
    if info.pairs:
        console.print()
        pairs = Table("prefill", "decode", "epoch", "channel", box=None)
        for p in info.pairs:
            pairs.add_row(
                p.prefill_worker,
                p.decode_worker,
                str(p.epoch),
                f"up over {p.transport}" if p.up else f"down: {p.reason}",
            )
        console.print(pairs)


def request_trace(command: Trace | Explain) -> int:
    """0 where the router still knows the request, else 1."""
    from cluster import timeline
    from cluster.cli import Trace

    with command.connection.client(command.target) as client:
        trace = client.request_trace(command.request_id)
    if trace is None:
        message = f"request_id: got {command.request_id!r}, which this router never had, or has forgotten"
        raise UnknownRequestError(message)
    if command.json:
        print(json.dumps(asdict(trace)))
    else:
        show = timeline.print_timeline if isinstance(command, Trace) else timeline.print_reasons
        show(trace, Console(highlight=False))
    return 0


def bench(command: Bench) -> int:
    """0 where every request succeeded, else 1."""
    from benchmarks.load import Concurrency, Poisson, random_jobs, run_load

    with Client(command.target) as client:
        vocab_size = client.model().vocab_size
    jobs = random_jobs(
        [(command.prompt_tokens, command.output_tokens)] * command.num_requests, vocab_size, command.seed
    )
    shape = Concurrency(command.max_concurrency) if command.rate is None else Poisson(command.rate, command.seed)
    report = asyncio.run(run_load(command.target, jobs, shape, timeout_s=command.timeout_s))
    summary = report.summary()
    if command.json:
        print(json.dumps(asdict(summary)))
    else:
        _print_summary(summary)
    return 0 if summary.num_failed == 0 else 1


def _print_summary(summary: Summary) -> None:
    console = Console()
    console.print(
        f"[b]{summary.num_requests} requests in {summary.duration_s:.1f} s[/b]: "
        f"{summary.requests_per_s:.2f} requests/s, {summary.output_tokens_per_s:.1f} tokens/s, "
        f"{summary.num_failed} failed {summary.errors or ''}"
    )
    table = Table("ms", "mean", "p50", "p90", "p99", "max")
    rows = (("TTFT", summary.ttft_s), ("ITL", summary.itl_s), ("TPOT", summary.tpot_s), ("E2E", summary.e2e_s))
    for name, p in rows:
        table.add_row(name, *("-" if v is None else f"{v * 1e3:.1f}" for v in (p.mean, p.p50, p.p90, p.p99, p.max)))
    console.print(table)
