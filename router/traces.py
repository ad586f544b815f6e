"""What happened to each request and when, for `penstock trace` and `penstock explain`; bounded, whatever comes.

Times are those of the router's clock. Of a worker's clock only durations are known, so clocks that differ can't bend a
trace; where such a stage lies is inferred from the router's times around it (`Span.slack_s`).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from core.clock import Clock
from core.events import LifecycleEvent
from core.messages import TransferStats
from core.ticket import Ticket
from router.ledger import Entry
from router.policies.model import Forecast, Placement

MAX_ATTEMPTS = 32
"""Kept of one request; a worker may refuse it any number of times."""
ROUTER = "router"


@dataclass(slots=True)
class AttemptTrace:
    """One placement and what came of it. Each `*_s` is when it happened; None where it did not, or not yet.

    `first_token_s` is when the prefill worker's first token came, `decoding_s` when the decode worker's did.
    `commit_wait_s` and `transfer` are durations that workers told. `waited_for` is what stood in the way before.
    """

    attempt: int
    placed_s: float
    prefill_worker: str
    decode_worker: str
    reasons: tuple[str, ...]
    num_tokens: int
    policy: str
    forecast: Forecast
    waited_for: tuple[str, ...] = ()
    reserved_s: float | None = None
    prefill_sent_s: float | None = None
    first_token_s: float | None = None
    accepted_s: float | None = None
    decoding_s: float | None = None
    ended_s: float | None = None
    commit_wait_s: float | None = None
    transfer: TransferStats | None = None
    outcome: str = "running"
    detail: str = ""


@dataclass(slots=True)
class RequestTrace:
    """`outcome` is queued or running until it is the finish reason, cancelled, or an error code in lower case."""

    request_id: str
    arrived_s: float
    arrived_unix_s: float
    num_prompt_tokens: int
    num_output_tokens: int = 0
    longest_gap_s: float = 0.0
    longest_gap_at_s: float = 0.0
    ended_s: float | None = None
    outcome: str = "queued"
    detail: str = ""
    attempts: list[AttemptTrace] = field(default_factory=list)
    num_forgotten_attempts: int = 0

    def elapsed_s(self, now_s: float) -> float:
        return (now_s if self.ended_s is None else self.ended_s) - self.arrived_s


@dataclass(frozen=True, slots=True)
class Span:
    """A stage, between two of the router's times; `end_s` is None while it goes on.

    With `slack_s` it lasted as long as the worker told, and its place is inferred: the router's own times around it
    leave that much room.
    """

    name: str
    attempt: int
    worker: str
    start_s: float
    end_s: float | None
    slack_s: float | None = None


class TraceRecorder:
    """An `Observer` that keeps the traces of the last `capacity` requests, running ones among them.

    `name_of` gives the worker's name for an incarnation that is connected.
    """

    def __init__(
        self, capacity: int, *, clock: Clock, wall_clock: Callable[[], float], name_of: Callable[[str], str]
    ) -> None:
        self._capacity = capacity
        self._clock, self._wall_clock = clock, wall_clock
        self._name_of = name_of
        self._traces: OrderedDict[str, RequestTrace] = OrderedDict()

    def find(self, request_id: str) -> RequestTrace | None:
        """By the request's id, or that of an answer of the OpenAI API."""
        for prefix in ("", "cmpl-", "chatcmpl-"):
            if request_id.startswith(prefix) and (trace := self._traces.get(request_id.removeprefix(prefix))):
                return trace
        return None

    def on_event(self, entry: Entry, event: LifecycleEvent, now_s: float) -> None:
        request_id = entry.request.request_id
        if event is LifecycleEvent.ARRIVED:
            self._open(request_id, entry.request.num_prompt_tokens, now_s)
        trace = self._traces.get(request_id)
        if trace is None:
            return  # over a thousand others came since
        trace.num_output_tokens = len(entry.request.output_token_ids)
        match event:
            case LifecycleEvent.ARRIVED:
                pass
            case LifecycleEvent.PLACED if entry.placement:
                self._place(trace, entry, entry.placement, now_s)
            case LifecycleEvent.REFUSED:
                _end_attempt(trace, now_s, "refused", entry.refusal)
            case LifecycleEvent.MOVED:
                _end_attempt(trace, now_s, "moved", "")
            case LifecycleEvent.STAYED:
                _end_attempt(trace, now_s, "refused", entry.refusal)
            case LifecycleEvent.RETRIED if entry.failure:
                _end_attempt(trace, now_s, "failed", f"{entry.failure.reason}: {entry.failure.message}")
            case LifecycleEvent.FINISHED if entry.finish_reason:
                _end(trace, now_s, entry.finish_reason.value, "")
            case LifecycleEvent.CANCELLED | LifecycleEvent.FAILED if entry.error:
                _end(trace, now_s, entry.error.code.name.lower(), entry.error.message)
            case _ if trace.attempts:
                _mark(trace.attempts[-1], event, now_s, entry)

    def on_tokens(self, entry: Entry, num_tokens: int, gap_s: float) -> None:  # noqa: ARG002
        trace = self._traces.get(entry.request.request_id)
        if trace and gap_s > trace.longest_gap_s:
            trace.longest_gap_s, trace.longest_gap_at_s = gap_s, self._clock()

    def on_transfer(self, entry: Entry, ticket: Ticket, transfer: TransferStats) -> None:
        trace = self._traces.get(entry.request.request_id)
        for attempt in trace.attempts if trace else ():
            if attempt.attempt == ticket.attempt:
                attempt.transfer = transfer

    def on_worker_failure(self, entry: Entry, incarnation: str, reason: str) -> None: ...

    def on_cluster_change(self) -> None: ...

    def _open(self, request_id: str, num_prompt_tokens: int, now_s: float) -> None:
        self._traces[request_id] = RequestTrace(request_id, now_s, self._wall_clock(), num_prompt_tokens)
        self._traces.move_to_end(request_id)
        if len(self._traces) > self._capacity:
            self._traces.popitem(last=False)

    def _place(self, trace: RequestTrace, entry: Entry, placement: Placement, now_s: float) -> None:
        trace.outcome = "running"
        attempt = AttemptTrace(
            attempt=entry.num_attempts + 1,
            placed_s=now_s,
            prefill_worker=self._name_of(placement.route.prefill),
            decode_worker=self._name_of(placement.route.decode),
            reasons=placement.reasons,
            num_tokens=entry.num_tokens,
            policy=placement.policy,
            forecast=placement.forecast,
            waited_for=entry.waits_for,
        )
        trace.attempts.append(attempt)
        if len(trace.attempts) > MAX_ATTEMPTS:
            del trace.attempts[1]  # the first and the last tell most
            trace.num_forgotten_attempts += 1


def _mark(attempt: AttemptTrace, event: LifecycleEvent, now_s: float, entry: Entry) -> None:
    match event:
        case LifecycleEvent.RESERVED:
            attempt.reserved_s = now_s
        case LifecycleEvent.PREFILL_SENT:
            attempt.prefill_sent_s = now_s
        case LifecycleEvent.FIRST_TOKEN | LifecycleEvent.RESUMED:
            attempt.first_token_s = now_s
        case LifecycleEvent.ACCEPTED:
            attempt.accepted_s, attempt.commit_wait_s = now_s, entry.stats.commit_wait_s
        case LifecycleEvent.FIRST_DECODE_TOKEN:
            attempt.decoding_s = now_s


def _end_attempt(trace: RequestTrace, now_s: float, outcome: str, detail: str) -> None:
    trace.outcome = "queued"
    if trace.attempts:
        last = trace.attempts[-1]
        last.ended_s, last.outcome, last.detail = now_s, outcome, detail


def _end(trace: RequestTrace, now_s: float, outcome: str, detail: str) -> None:
    if trace.attempts and trace.attempts[-1].ended_s is None:
        _end_attempt(trace, now_s, outcome, detail)
    trace.ended_s, trace.outcome, trace.detail = now_s, outcome, detail


# ---- spans


def spans_of(trace: RequestTrace) -> Iterator[Span]:
    """The stages of a request, attempt by attempt; between two attempts it waits in the queue."""
    waiting_since_s: float | None = trace.arrived_s
    for attempt in trace.attempts:
        if waiting_since_s is not None:
            yield Span("queue", attempt.attempt, ROUTER, waiting_since_s, attempt.placed_s)
        yield from _stages(attempt)
        waiting_since_s = attempt.ended_s
    if waiting_since_s is not None and waiting_since_s != trace.ended_s:
        number = trace.attempts[-1].attempt + 1 if trace.attempts else 1
        yield Span("queue", number, ROUTER, waiting_since_s, trace.ended_s)


def _stages(attempt: AttemptTrace) -> Iterator[Span]:
    """Each begins where the one before ended; the one that was cut off ends with the attempt."""
    a, local = attempt, attempt.prefill_worker == attempt.decode_worker
    marks: list[tuple[str, str, float | None, float | None]] = [
        ("reserve", a.decode_worker, None if local else a.placed_s, a.reserved_s),
        ("prefill", a.prefill_worker, a.prefill_sent_s, a.first_token_s),
        ("commit", a.decode_worker, None if local else a.first_token_s, a.accepted_s),
        ("first_decode_step", a.decode_worker, a.first_token_s if local else a.accepted_s, a.decoding_s),
        ("decode", a.decode_worker, a.decoding_s, a.ended_s),
    ]
    for name, worker, start_s, end_s in marks:
        if start_s is None or (end_s is None and start_s == a.ended_s):
            continue  # the attempt was over before it began
        yield Span(name, a.attempt, worker, start_s, a.ended_s if end_s is None else end_s)
        if name == "prefill":
            yield from _transfer(attempt)
        elif name == "commit":
            yield from _commit_wait(attempt)


def _transfer(attempt: AttemptTrace) -> Iterator[Span]:
    """The channel's time, as two pieces around the end of compute, which the first token tells a message later."""
    transfer, start_s, computed_s = attempt.transfer, attempt.prefill_sent_s, attempt.first_token_s
    if transfer is None or start_s is None or computed_s is None:
        return
    room_s = computed_s - start_s
    hidden_s = min(max(0.0, transfer.transfer_s - transfer.exposed_s), room_s)
    hidden_from_s = computed_s - hidden_s
    yield Span("transfer_hidden", attempt.attempt, attempt.prefill_worker, hidden_from_s, computed_s, room_s - hidden_s)
    latest_s = attempt.accepted_s if attempt.accepted_s is not None else attempt.ended_s
    exposed_from_s = computed_s
    if latest_s is not None:  # all of it was there when decode took over
        exposed_from_s = max(start_s, min(computed_s, latest_s - transfer.exposed_s))
    end_s = exposed_from_s + transfer.exposed_s
    slack_s = max(0.0, (latest_s or end_s) - end_s)
    yield Span("transfer_exposed", attempt.attempt, attempt.prefill_worker, exposed_from_s, end_s, slack_s)


def _commit_wait(attempt: AttemptTrace) -> Iterator[Span]:
    """Decode's wait ended when it accepted, of which the router heard a message later."""
    if attempt.commit_wait_s is None or attempt.accepted_s is None or attempt.first_token_s is None:
        return
    room_s = attempt.accepted_s - attempt.first_token_s
    waited_s = min(attempt.commit_wait_s, room_s)
    start_s = attempt.accepted_s - waited_s
    yield Span("commit_wait", attempt.attempt, attempt.decode_worker, start_s, attempt.accepted_s, room_s - waited_s)
