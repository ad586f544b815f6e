"""The heart of the router: takes requests, queues them, places them late, and sees each to its end."""

from __future__ import annotations

import asyncio
import random
import uuid
from itertools import count

from core.clock import Clock
from core.errors import (
    DeadlineExceededError,
    InvalidRequestError,
    OverloadedError,
    PenstockError,
    RequestCancelledError,
    UnavailableError,
)
from core.events import LifecycleEvent
from core.messages import Event
from core.request import FinishReason, Request, RequestState
from router.admission import Door, RetryAdvice
from router.attempt import Outcome, Refusal, TooSlow
from router.config import DispatchConfig, PlacementConfig
from router.fair_queue import FairQueue
from router.flow import AttemptFlow
from router.info import ClusterInfo
from router.learning import Learner
from router.ledger import Counts, Entry, Failure, Ledger, Observer
from router.moving import Mover
from router.policies import make_policy
from router.policies.model import Need, Placement
from router.policies.place import place
from router.policies.search import can_ever, wish
from router.silent import Silent
from router.stream import RequestStream
from router.workers import Workers


class Dispatcher:
    """Binds late: a request waits here, not with a worker, until a route has room for it.

    Whatever fails is tried again, with the tokens streamed so far as part of the prompt, so that the client sees
    neither a gap nor a repeat. Lives on one event loop; nothing here waits.
    """

    def __init__(
        self,
        config: DispatchConfig,
        *,
        workers: Workers,
        clock: Clock,
        observer: Observer | None = None,
        placement: PlacementConfig | None = None,
        rng: random.Random | None = None,
    ) -> None:
        self._config = config
        self._placement = placement or PlacementConfig()
        self.policy = make_policy(self._placement.policy, self._placement.tuning)
        self._rng = rng or random.Random()
        self._fleet = workers.fleet
        self._workers = workers
        self._clock = clock
        self._observer = observer or Silent()
        self._queue = FairQueue(config.tenant_weights)
        self._advice = RetryAdvice()
        self._door = Door(config, self._queue, self._advice, self._fleet, self._placement.slo_ttft_s)
        self._seq = count()
        self._ledger = Ledger(self._observer)
        self.counts = Counts()
        self._flow = AttemptFlow(
            config,
            workers=workers,
            ledger=self._ledger,
            counts=self.counts,
            learner=Learner(workers.fleet),
            clock=clock,
            on_outcome=self._on_outcome,
        )
        self._mover = Mover(
            workers=workers,
            ledger=self._ledger,
            flow=self._flow,
            counts=self.counts,
            clock=clock,
            need=self._need,
            book=self._book,
        )
        self._cluster = -1  # version of the fleet that the queue knows
        self._wake_up: asyncio.Handle | None = None
        workers.subscribe(self)

    # ---- the front doors' side

    def submit(self, request: Request, *, timeout_s: float | None) -> RequestStream:
        """Queue a request. `OverloadedError` where the queue is full, `InvalidRequestError` where its id is in use or
        no connected worker could ever hold it. `timeout_s` counts from now; None means no deadline."""
        self._check(request, timeout_s)
        now_s = self._clock()
        stream = RequestStream(
            request.request_id,
            max_buffered_tokens=self._config.stream_buffer_tokens,
            on_cancel=lambda: self._end(entry, error=RequestCancelledError("the client cancelled the request")),
            on_stop=lambda: self._end(entry, finish_reason=FinishReason.STOP),
        )
        entry = Entry(request, stream, next(self._seq), uuid.uuid4().hex, arrived_s=now_s)
        if timeout_s is not None:
            entry.deadline_timer = asyncio.get_running_loop().call_later(timeout_s, self._expire, entry, timeout_s)
        self._ledger.open(entry)
        self._queue.push(entry, self._door.claim(request, timeout_s, now_s))
        self._pump()
        return stream

    def cancel(self, request_id: str) -> bool:
        """Stop a request; False where there is none of that id."""
        entry = self._ledger.live(request_id)
        if entry is None:
            return False
        self._end(entry, error=RequestCancelledError("the request was cancelled"))
        return True

    def info(self) -> ClusterInfo:
        """The cluster as it stands now."""
        return ClusterInfo(
            workers=self._workers.describe_workers(lambda incarnation: self._ledger.usage(incarnation).num_credits),
            pairs=self._workers.describe_pairs(),
            num_queued=len(self._queue),
            num_running=self._ledger.num_live - len(self._queue),
        )

    @property
    def can_serve(self) -> bool:
        return self._fleet.longest_route(self._placement.disaggregate) > 0

    @property
    def max_model_len(self) -> int | None:
        return self._workers.max_model_len

    @property
    def ledger(self) -> Ledger:
        return self._ledger

    def close(self) -> None:
        """Fail whatever is left. Sessions end afterwards, with `Workers.close()`."""
        for entry in self._ledger.entries():
            self._end(entry, error=UnavailableError("the router is shutting down"))
            self._flow.fence(entry, "stopped")
        if self._wake_up:
            self._wake_up.cancel()

    def check_integrity(self) -> None:
        """`IntegrityError` unless queue, ledger, credits and sessions agree."""
        granted = {hello.incarnation: hello.credits for hello, _ in self._workers.connected()}
        self._ledger.check_integrity(self._queue, granted)

    def _check(self, request: Request, timeout_s: float | None) -> None:
        if self._ledger.live(request.request_id):
            raise InvalidRequestError("request_id", request.request_id, "is in use by a request that still runs")
        longest = self._workers.max_model_len
        if longest is not None and request.num_tokens + 1 > longest:
            raise InvalidRequestError("prompt", request.num_tokens, f"must be under {longest} tokens")
        if len(self._queue) >= self._config.max_queue_len:
            self._pump()  # what has room by now does not count
        self._book()
        self._door.check(request, timeout_s, self._clock())

    # ---- the workers' side

    def on_event(self, incarnation: str, event: Event) -> None:
        self._flow.on_event(incarnation, event)

    def on_lost(self, incarnation: str, reason: str) -> None:
        self._flow.on_lost(incarnation, reason)

    def on_pair_down(self, prefill: str, decode: str, epoch: int, reason: str) -> None:
        self._flow.on_pair_down(prefill, decode, epoch, reason)

    def on_change(self) -> None:
        """Look at the queue again, once for all that happens in this turn of the loop."""
        if self._wake_up is None:
            self._wake_up = asyncio.get_running_loop().call_soon(self._pump)

    def live_transfer_ids(self, incarnation: str) -> tuple[str, ...]:
        return self._ledger.live_transfer_ids(incarnation)

    # ---- placing

    def _pump(self) -> None:
        """Place from the head of the queue for as long as there is room. Who can't be placed at all blocks nobody."""
        if self._wake_up:
            self._wake_up.cancel()
            self._wake_up = None
        self._book()
        self._notice_cluster()
        self._mover.run()
        while (entry := self._queue.first()) is not None:
            decision = place(self.policy, self._need(entry), self._fleet, self._rng)
            if isinstance(decision, Placement):
                self._start(entry, decision)
                self._book()
                continue
            entry.waits_for = decision.reasons
            if decision.possible:
                break
            self._queue.strand(entry)
            if entry.unavailable_timer is None:
                patience_s = self._config.unavailable_timeout_s
                loop = asyncio.get_running_loop()
                entry.unavailable_timer = loop.call_later(patience_s, self._give_up, entry)
        for wishing in (entry, self._queue.first_stranded()):
            if wishing is not None:
                self._wish(wishing)
        self._door.drain.on_length(len(self._queue), self._clock())

    def _wish(self, entry: Entry) -> None:
        """A pair without a channel that has room for the request is connected, for this one or the next."""
        if entry.request.disaggregate == "local" or not self._workers.any_idle_pair:
            return
        route = wish(self._need(entry), self._fleet, self._workers.is_idle)
        if route is not None:
            self._workers.want(route, self._ledger.pairs_in_use())

    def _start(self, entry: Entry, placement: Placement) -> None:
        now_s = self._clock()
        self._door.drain.on_served(self._queue.serve(entry), now_s)
        if entry.stats.ttft_s is None:
            entry.stats.queue_s = now_s - entry.arrived_s
        self.counts.placements.update(placement.reasons)
        entry.placement = placement
        entry.request.advance(RequestState.RUNNING)
        self._ledger.note(entry, LifecycleEvent.PLACED, now_s)
        entry.waits_for = ()
        self._workers.touch(placement.route)
        self._flow.start(entry, placement)

    def _need(self, entry: Entry) -> Need:
        request, config = entry.request, self._placement
        refused_by = NOBODY
        if entry.refusals:
            refused_by = frozenset(w for w, load in entry.refusals.items() if self._workers.load(w) == load)
        ttft_s = None
        if config.slo_ttft_s is not None and entry.stats.ttft_s is None:
            ttft_s = max(0.0, config.slo_ttft_s - (self._clock() - entry.arrived_s))
        return Need(
            num_tokens=request.num_tokens,
            max_total_tokens=request.num_prompt_tokens + request.sampling.max_tokens,
            avoid=frozenset(entry.avoid) if entry.avoid else NOBODY,
            refused_by=refused_by,
            hashes=entry.hashes.of(request, self._fleet.cache_kinds) if len(self._fleet.caches) else {},
            ttft_s=ttft_s,
            itl_s=config.slo_itl_s,
            mode=request.disaggregate,
        )

    def _book(self) -> None:
        """The fleet learns what is asked of workers."""
        for incarnation in self._ledger.take_touched():
            usage = self._ledger.usage(incarnation)
            self._fleet.book(
                incarnation,
                used_credits=usage.num_credits,
                pending_tokens=usage.pending_tokens,
                pending_blocks=usage.pending_blocks,
            )

    def _notice_cluster(self) -> None:
        """Those who waited for any worker at all, and now may have one, wait without limit again."""
        if self._fleet.version == self._cluster:
            return
        self._cluster = self._fleet.version
        for entry in self._queue.stranded:
            if can_ever(self._need(entry), self._fleet):
                stop(entry.unavailable_timer)
                entry.unavailable_timer = None
                self._queue.rescue(entry)
        self._observer.on_cluster_change()

    def _give_up(self, entry: Entry) -> None:
        problem = (
            self._workers.problem(entry.request.disaggregate)
            or f"no connected worker can hold {entry.num_tokens} tokens"
        )
        self._end(entry, error=UnavailableError(f"waited {self._config.unavailable_timeout_s:g} s, but {problem}"))

    # ---- ends

    def _on_outcome(self, entry: Entry, outcome: Outcome) -> None:
        if entry.on_copied is not None:
            entry.on_copied(isinstance(outcome, FinishReason))
            self.on_change()
            return
        match outcome:
            case FinishReason():
                self._end(entry, finish_reason=outcome)
            case Refusal():
                self._on_refused(entry, outcome)
            case Failure():
                self._on_failed(entry, outcome)
            case TooSlow():
                limit = self._config.stream_buffer_tokens
                message = f"the client reads too slowly: over {limit} tokens wait to be read"
                self._end(entry, error=OverloadedError(message, retry_after_s=1.0))

    def _on_refused(self, entry: Entry, refusal: Refusal) -> None:
        """Back to the head of the queue. A worker that refuses while it has nothing to do would do so for ever."""
        self.counts.refusals[refusal.reason] += 1
        entry.refusal = refusal.reason
        load = self._workers.load(refusal.incarnation)
        idle = load and not (load.num_running or load.num_waiting or load.num_held or load.draining)
        if idle and not self._ledger.usage(refusal.incarnation).num_credits:
            self._on_failed(entry, Failure("refused_idle", f"an idle worker refused: {refusal.reason}"))
            return
        if load:
            entry.refusals[refusal.incarnation] = load
        self._requeue(entry, LifecycleEvent.REFUSED)

    def _on_failed(self, entry: Entry, failure: Failure) -> None:
        self.counts.failures[failure.reason] += 1
        entry.failure = failure
        entry.num_failures += 1
        if failure.reason == "deadline_exceeded":  # the worker's clock was a little ahead
            self._end(entry, error=DeadlineExceededError(failure.message))
            return
        if failure.reason == "grammar":  # it would fail anywhere
            grammar = entry.request.sampling.grammar
            self._end(
                entry, error=InvalidRequestError("structured output", grammar, f"can't be met: {failure.message}")
            )
            return
        if failure.incarnation:
            entry.avoid.add(failure.incarnation)
        if entry.num_failures < self._config.max_attempts:
            self._requeue(entry, LifecycleEvent.RETRIED)
            return
        message = f"gave up after {entry.num_failures} attempts, the last on {failed_on(entry)}: {failure.message}"
        self._end(entry, error=UnavailableError(message))

    def _requeue(self, entry: Entry, event: LifecycleEvent) -> None:
        entry.request.advance(RequestState.WAITING)
        self._ledger.note(entry, event, self._clock())
        self._queue.push(entry, self._door.claim(entry.request, None, entry.arrived_s))
        self.on_change()

    def _expire(self, entry: Entry, timeout_s: float) -> None:
        self._end(entry, error=DeadlineExceededError(f"not finished within {timeout_s:g} s"))

    def _end(
        self, entry: Entry, *, finish_reason: FinishReason | None = None, error: PenstockError | None = None
    ) -> None:
        """Exactly one end: of a request that had one already, nothing changes."""
        if entry.ended:
            return
        now_s = self._clock()
        stop(entry.deadline_timer)
        stop(entry.unavailable_timer)
        self._queue.remove(entry)
        entry.finish_reason, entry.error = finish_reason, error
        self._flow.fence(entry, "stopped" if error is None else error.code.name.lower())
        entry.request.advance(RequestState.FINISHED)
        entry.request.finish_reason = finish_reason
        entry.stats.e2e_s = now_s - entry.arrived_s
        if error is None:
            self._flow.learner.on_answer(entry.request.num_output_tokens)
            self._ledger.note(entry, LifecycleEvent.FINISHED, now_s)
            entry.stream.push((), finish_reason)
        else:
            cancelled = isinstance(error, RequestCancelledError)
            self._ledger.note(entry, LifecycleEvent.CANCELLED if cancelled else LifecycleEvent.FAILED, now_s)
            entry.stream.fail(error)
        self._ledger.end(entry)
        self._advice.on_end(now_s)
        self.on_change()


NOBODY: frozenset[str] = frozenset()


def failed_on(entry: Entry) -> str:
    stats = entry.stats
    if stats.prefill_worker == stats.decode_worker:
        return f"worker {stats.prefill_worker}"
    return f"workers {stats.prefill_worker} and {stats.decode_worker}"


def stop(timer: asyncio.TimerHandle | None) -> None:
    if timer:
        timer.cancel()
