"""The ledger's life-cycle events as metrics."""

from __future__ import annotations

from collections.abc import Callable

from core.events import LifecycleEvent
from core.messages import TransferStats
from core.ticket import Ticket
from router.info import ClusterInfo
from router.ledger import Entry, Observer
from telemetry.cluster import ClusterSample, WorkerSample
from telemetry.metrics import Metrics


class Observers:
    """Several observers as one."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers

    def on_event(self, entry: Entry, event: LifecycleEvent, now_s: float) -> None:
        for observer in self._observers:
            observer.on_event(entry, event, now_s)

    def on_tokens(self, entry: Entry, num_tokens: int, gap_s: float) -> None:
        for observer in self._observers:
            observer.on_tokens(entry, num_tokens, gap_s)

    def on_transfer(self, entry: Entry, ticket: Ticket, transfer: TransferStats) -> None:
        for observer in self._observers:
            observer.on_transfer(entry, ticket, transfer)

    def on_worker_failure(self, entry: Entry, incarnation: str, reason: str) -> None:
        for observer in self._observers:
            observer.on_worker_failure(entry, incarnation, reason)

    def on_cluster_change(self) -> None:
        for observer in self._observers:
            observer.on_cluster_change()


class MetricsObserver:
    """`on_cluster_change` is passed on to whom it concerns; `name_of` gives the worker's id of an incarnation."""

    def __init__(self, metrics: Metrics, on_cluster_change: Callable[[], None], name_of: Callable[[str], str]) -> None:
        self._metrics = metrics
        self._pass_on = on_cluster_change
        self._name_of = name_of

    def on_event(self, entry: Entry, event: LifecycleEvent, now_s: float) -> None:  # noqa: ARG002 - durations are in stats
        match event:
            case LifecycleEvent.PLACED:
                self._metrics.on_attempt()
                if entry.placement:
                    self._metrics.on_placement(entry.placement.policy, entry.placement.reasons)
            case LifecycleEvent.FIRST_TOKEN if entry.stats.ttft_s is not None:
                self._metrics.on_first_token(entry.request.num_prompt_tokens, entry.stats.ttft_s)
            case LifecycleEvent.REFUSED:
                self._metrics.on_refusal(entry.refusal)
            case LifecycleEvent.RETRIED if entry.failure:
                computed = entry.num_tokens - 1 if entry.stats.ttft_s is not None else 0
                self._metrics.on_retry(entry.failure.reason, num_recomputed_tokens=computed)
            case LifecycleEvent.FINISHED if entry.finish_reason:
                self._metrics.on_success(entry.finish_reason.value, entry.stats)
            case LifecycleEvent.CANCELLED | LifecycleEvent.FAILED if entry.error:
                self._metrics.on_failure(entry.error.code.name.lower())

    def on_tokens(self, entry: Entry, num_tokens: int, gap_s: float) -> None:  # noqa: ARG002
        self._metrics.on_tokens(num_tokens, gap_s)

    def on_transfer(self, entry: Entry, ticket: Ticket, transfer: TransferStats) -> None:  # noqa: ARG002
        pair = self._name_of(ticket.prefill_incarnation), self._name_of(ticket.decode_incarnation)
        self._metrics.transfers.on_transfer(*pair, transfer.num_bytes, transfer.transfer_s, transfer.exposed_s)

    def on_worker_failure(self, entry: Entry, incarnation: str, reason: str) -> None:  # noqa: ARG002
        self._metrics.transfers.on_worker_failure(self._name_of(incarnation), reason)

    def on_cluster_change(self) -> None:
        self._pass_on()


def cluster_sample(info: ClusterInfo) -> ClusterSample:
    """Of the workers that are connected: of others nothing is known."""
    return ClusterSample(
        num_running=info.num_running,
        num_waiting=info.num_queued,
        workers=tuple(
            WorkerSample(
                worker=worker.worker_id,
                incarnation=worker.incarnation,
                num_running=worker.load.num_running,
                num_waiting=worker.load.num_waiting,
                num_blocks=worker.num_blocks,
                num_free_blocks=worker.load.num_free_blocks,
                num_preemptions=worker.load.num_preemptions,
                num_prefix_queries=worker.load.num_prefix_queries,
                num_prefix_hits=worker.load.num_prefix_hits,
                mask_wait_s=worker.load.mask_wait_s,
                num_drafts=worker.load.num_drafts,
                num_draft_tokens=worker.load.num_draft_tokens,
                num_accepted_tokens=worker.load.num_accepted_tokens,
                num_parked=worker.load.num_parked,
                parked_bytes=worker.load.parked_bytes,
                num_parks=worker.load.num_parks,
                num_recomputes=worker.load.num_recomputes,
            )
            for worker in info.workers
            if worker.connected
        ),
    )
