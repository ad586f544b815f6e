"""What a load showed, named as in `vllm bench serve`: mean, median and percentiles in ms, goodput, attainment."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.serve.driver import Load
from benchmarks.serve.records import Record
from core.errors import ConfigError

METRICS = {
    "ttft": "Time to first token",
    "tpot": "Time per output token, first excluded",
    "itl": "Inter-token latency, all gaps",
    "max_itl": "Longest gap of a request",
    "e2el": "End to end",
}
SLO_METRICS = ("ttft", "tpot", "e2el", "max_itl")
SLO_SCALES = (0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 5.0, 10.0)
NUM_CURVE_POINTS = 100
MAX_LAG_S = 0.005
"""Of this process, at the 99th percentile; with more, its times are not the server's."""

Json = dict[str, Any]


def parse_goodput(pairs: Iterable[str]) -> dict[str, float]:
    """`ttft:200 tpot:50` as limits in ms, by metric. `ConfigError` where a pair is none."""
    limits: dict[str, float] = {}
    for pair in pairs:
        name, _, value = pair.partition(":")
        try:
            limit = float(value)
        except ValueError:
            limit = 0.0
        if name not in SLO_METRICS or not limit > 0:
            raise ConfigError("goodput", pair, f"must be METRIC:MS, such as ttft:200, of {', '.join(SLO_METRICS)}")
        limits[name] = limit
    return limits


def meets(record: Record, limits: Mapping[str, float], scale: float = 1.0) -> bool:
    """Within every limit (ms) times `scale`; a metric that a request doesn't have, such as the gap after its only
    token, counts as met, a request that failed does not."""
    if record.error or record.ttft_s is None:
        return False
    values = ((record.value_s(name), limit) for name, limit in limits.items())
    return all(value is None or value * 1e3 <= limit * scale for value, limit in values)


def values_ms(records: Iterable[Record], metric: str) -> list[float]:
    """All that requests which ended well have of a metric."""
    done = [record for record in records if not record.error]
    if metric == "itl":
        return [gap * 1e3 for record in done for gap in record.gaps_s]
    return [value * 1e3 for record in done if (value := record.value_s(metric)) is not None]


def report(
    load: Load,
    *,
    settings: Json,
    percentiles: Sequence[float] = (50.0, 90.0, 99.0),
    goodput: Mapping[str, float] | None = None,
    detailed: bool = False,
) -> Json:
    """JSON values: settings, counts, rates, percentiles of each metric, SLOs, curves; `detailed` adds each request.

    Rates are over `duration`, from the first due time to the last end.
    """
    records = load.records
    done = [record for record in records if not record.error]
    duration_s = max((r.end_s for r in records), default=0.0) - min((r.due_s for r in records), default=0.0)
    num_inputs, num_outputs = sum(r.num_inputs for r in done), sum(r.num_outputs for r in done)
    result: Json = {
        **settings,
        "duration": duration_s,
        "completed": len(done),
        "failed": len(records) - len(done),
        "errors": dict(Counter(record.error for record in records if record.error).most_common(20)),
        "total_input_tokens": num_inputs,
        "total_output_tokens": num_outputs,
        "total_messages": sum(len(record.tokens_s) for record in done),
        "request_throughput": _rate(len(done), duration_s),
        "output_throughput": _rate(num_outputs, duration_s),
        "total_token_throughput": _rate(num_inputs + num_outputs, duration_s),
        "max_concurrent_requests": max_concurrency(records),
    }
    for metric in METRICS:
        result |= statistics(metric, values_ms(records, metric), percentiles)
    if goodput:
        good = sum(meets(record, goodput) for record in records)
        result |= {
            "goodput_slos_ms": dict(goodput),
            "request_goodput": _rate(good, duration_s),
            "slo_attainment": good / len(records) if records else 0.0,
            "slo_scale_attainment": [
                [scale, sum(meets(record, goodput, scale) for record in records) / max(1, len(records))]
                for scale in SLO_SCALES
            ],
        }
    result["attainment_curves_ms"] = {metric: curve(values_ms(records, metric)) for metric in METRICS}
    result["client"] = client_figures(load)
    if detailed:
        result["requests"] = [request_json(record) for record in records]
    return result


def statistics(metric: str, values: Sequence[float], percentiles: Sequence[float]) -> Json:
    """`mean_ttft_ms`, `median_ttft_ms`, `std_ttft_ms`, `max_ttft_ms`, `p99_ttft_ms`; None where there are no values."""
    names = [f"p{percentile:g}" for percentile in percentiles]
    if not values:
        return {f"{name}_{metric}_ms": None for name in ("mean", "median", "std", "max", *names)}
    sample = np.asarray(values)
    found = np.percentile(sample, list(percentiles)) if percentiles else []
    return {
        f"mean_{metric}_ms": float(sample.mean()),
        f"median_{metric}_ms": float(np.median(sample)),
        f"std_{metric}_ms": float(sample.std()),
        f"max_{metric}_ms": float(sample.max()),
        **{f"{name}_{metric}_ms": float(value) for name, value in zip(names, found, strict=True)},
    }


def curve(values: Sequence[float]) -> list[float]:
    """The values that 0, 1, 2, ... 100 % of the sample don't exceed: read the other way, who attained which target.
    Of requests that failed nothing is in there."""
    if not values:
        return []
    points: list[float] = np.percentile(np.asarray(values), np.linspace(0, 100, NUM_CURVE_POINTS + 1)).tolist()
    return points


def max_concurrency(records: Iterable[Record]) -> int:
    """Most requests that were under way at once."""
    events = sorted((at_s, step) for r in records for at_s, step in ((r.sent_s, 1), (r.end_s, -1)))
    running, most = 0, 0
    for _, step in events:
        running += step
        most = max(most, running)
    return most


def client_figures(load: Load) -> Json:
    """How far this process itself can be trusted: how late it sent, and how late it woke up, in ms."""
    late = np.asarray([record.sent_s - record.due_s for record in load.records] or [0.0]) * 1e3
    lags = np.asarray(load.lags_s or [0.0]) * 1e3
    return {
        "p99_send_delay_ms": float(np.percentile(late, 99)),
        "max_send_delay_ms": float(late.max()),
        "p99_lag_ms": float(np.percentile(lags, 99)),
        "max_lag_ms": float(lags.max()),
        "trustworthy": bool(np.percentile(lags, 99) <= MAX_LAG_S * 1e3),
    }


def request_json(record: Record) -> Json:
    return {
        "index": record.index,
        "due_s": record.due_s,
        "sent_s": record.sent_s,
        "end_s": record.end_s,
        "input_tokens": record.num_inputs,
        "output_tokens": record.num_outputs,
        "ttft_ms": _ms(record.ttft_s),
        "itls_ms": [gap * 1e3 for gap in record.gaps_s],
        "e2el_ms": _ms(record.e2e_s),
        "error": record.error,
    }


def _rate(count: float, duration_s: float) -> float:
    return count / duration_s if duration_s > 0 else 0.0


def _ms(value_s: float | None) -> float | None:
    return None if value_s is None else value_s * 1e3
