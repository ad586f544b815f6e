"""The only registry of metrics. Names under `vllm:` are those that existing dashboards load; ours are `penstock_*`."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest

from core.stats import RequestStats
from telemetry.cluster import ClusterCollector, ClusterSample
from telemetry.transfers import TransferMetrics

CONTENT_TYPE = CONTENT_TYPE_LATEST
ENGINE = "0"
"""Of the label `engine` that those dashboards expect. The whole cluster is one engine to its users."""

# Percentiles are interpolated inside a bucket, so buckets are narrow where times are short.
_BELOW_10_MS = (0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
_BELOW_1_S = (10, 12.5, 15, 20, 25, 30, 40, 50, 60, 80, 100, 125, 150, 200, 250, 300, 400, 500, 750)
GAP_BUCKETS = tuple(ms / 1000 for ms in (*_BELOW_10_MS, *_BELOW_1_S, 1_000, 2_000, 5_000, 10_000))
STAGE_BUCKETS = (*GAP_BUCKETS, 20.0, 30.0, 60.0, 120.0, 300.0)


class Metrics:
    """Counts what happens to requests; all methods are cheap and never wait.

    `penstock_stage_seconds` tells where the time of a request went. Stages of one request do not simply add up:
    a transfer runs beside prefill, and only its exposed part is waited for.
    """

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self.transfers = TransferMetrics(self.registry)
        self._model_name = model_name
        self._ttft = self._histogram("vllm:time_to_first_token_seconds", "Arrival to first token")
        self._gap = self._histogram("vllm:inter_token_latency_seconds", "Gap between two tokens", GAP_BUCKETS)
        self._e2e = self._histogram("vllm:e2e_request_latency_seconds", "Arrival to last token")
        self._queue = self._histogram("vllm:request_queue_time_seconds", "Arrival to the choice of workers")
        self._prefill = self._histogram("vllm:request_prefill_time_seconds", "Choice of workers to first token")
        self._decode = self._histogram("vllm:request_decode_time_seconds", "First token to last token")
        self._inference = self._histogram("vllm:request_inference_time_seconds", "Choice of workers to last token")
        self._prompt_tokens = self._counter("vllm:prompt_tokens", "Prompt tokens read")
        self._output_tokens = self._counter("vllm:generation_tokens", "Output tokens written")
        self._success = self._labelled("vllm:request_success", "Requests that ended by themselves", "finished_reason")
        self._stages = Histogram(
            "penstock_stage_seconds",
            "Where the time of requests went",
            ["stage"],
            buckets=STAGE_BUCKETS,
            registry=self.registry,
        )
        self._requests = self._own("penstock_requests", "Requests by how they ended", "outcome")
        self._attempts = self._own("penstock_attempts", "Times that a request was given to workers")
        self._placements = self._own("penstock_placements", "Placements, once for each reason", "policy", "reason")
        self._retries = self._own("penstock_retries", "Attempts that failed and were made again", "reason")
        self._recomputed = self._own(
            "penstock_recomputed_tokens",
            "Tokens that had K and V when an attempt failed; what a prefix cache still holds is not computed again",
            "reason",
        )
        self._refusals = self._own("penstock_refusals", "Times that a worker had no room", "reason")

    def watch_cluster(self, sample: Callable[[], ClusterSample]) -> None:
        """Gauges of queue and workers, read from `sample` at every scrape. Call once."""
        self.registry.register(ClusterCollector(sample, self._model_name, ENGINE))

    def render(self) -> bytes:
        """The exposition that Prometheus scrapes, of type `CONTENT_TYPE`."""
        return generate_latest(self.registry)

    # ---- what happens

    def on_attempt(self) -> None:
        self._attempts.inc()

    def on_placement(self, policy: str, reasons: Iterable[str]) -> None:
        for reason in reasons:
            self._placements.labels(policy, reason).inc()

    def on_refusal(self, reason: str) -> None:
        self._refusals.labels(reason).inc()

    def on_retry(self, reason: str, *, num_recomputed_tokens: int = 0) -> None:
        self._retries.labels(reason).inc()
        self._recomputed.labels(reason).inc(num_recomputed_tokens)

    def on_first_token(self, num_prompt_tokens: int, ttft_s: float) -> None:
        self._prompt_tokens.inc(num_prompt_tokens)
        self._output_tokens.inc()
        self._ttft.observe(ttft_s)

    def on_tokens(self, num_tokens: int, gap_s: float) -> None:
        """Tokens after the first, that came together, `gap_s` after those before."""
        self._output_tokens.inc(num_tokens)
        self._gap.observe(gap_s)

    def on_success(self, finish_reason: str, stats: RequestStats) -> None:
        """A request ended by itself; `stats` are complete."""
        self._success.labels(self._model_name, ENGINE, finish_reason).inc()
        self._requests.labels(finish_reason).inc()
        if stats.e2e_s is not None:
            self._e2e.observe(stats.e2e_s)
            if stats.queue_s is not None:
                self._queue.observe(stats.queue_s)
                self._inference.observe(stats.e2e_s - stats.queue_s)
                if stats.ttft_s is not None:
                    self._prefill.observe(stats.ttft_s - stats.queue_s)
            if stats.ttft_s is not None:
                self._decode.observe(stats.e2e_s - stats.ttft_s)
        self._observe_stages(stats)

    def on_failure(self, outcome: str) -> None:
        """A request ended otherwise: `outcome` is cancelled, or the name of an error code in lower case."""
        self._requests.labels(outcome).inc()

    def _observe_stages(self, stats: RequestStats) -> None:
        hidden_s = None
        if stats.transfer_s is not None and stats.transfer_exposed_s is not None:
            hidden_s = max(0.0, stats.transfer_s - stats.transfer_exposed_s)
        durations_s = {
            "queue": stats.queue_s,
            "reserve": stats.reserve_s,
            "prefill": stats.prefill_s,
            "transfer_exposed": stats.transfer_exposed_s,
            "transfer_hidden": hidden_s,
            "commit_wait": stats.commit_wait_s,
            "first_decode_step": stats.first_decode_step_s,
        }
        for stage, duration_s in durations_s.items():
            if duration_s is not None:
                self._stages.labels(stage).observe(duration_s)

    # ---- construction

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] = STAGE_BUCKETS) -> Histogram:
        labels = ["model_name", "engine"]
        histogram = Histogram(name, text, labels, buckets=buckets, registry=self.registry)
        return histogram.labels(self._model_name, ENGINE)

    def _counter(self, name: str, text: str) -> Counter:
        return self._labelled(name, text).labels(self._model_name, ENGINE)

    def _labelled(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, ["model_name", "engine", *labels], registry=self.registry)

    def _own(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)
