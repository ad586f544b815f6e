"""What the router knows of every request, and which workers hold something for it: the proof that nothing leaks.

An entry is *live* until its stream ended. It stays in the ledger until, besides, no worker holds anything for it.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from core.errors import IntegrityError, PenstockError
from core.events import LifecycleEvent
from core.messages import Load, SequenceTokens, TransferStats, Work
from core.request import FinishReason, Request
from core.stats import RequestStats
from core.ticket import AttemptKey, Ticket
from router.policies.model import Placement
from router.prompt_hashes import PromptHashes
from router.stream import RequestStream


class Stage(Enum):
    """Where an attempt stands. A local one has no reservation and no handover: it begins at PREFILLING.

    ```
    RESERVING ──Reserved──▶ PREFILLING ──Prefilled──▶ ACCEPTING ──Accepted──▶ DECODING ──finish──▶ FINISHING
                                 └───────── local: Prefilled ────────────────────┘
    ```
    In FINISHING all tokens are there and no worker computes; the figures of the transfer are awaited for a moment.
    """

    RESERVING = "reserving"
    PREFILLING = "prefilling"
    ACCEPTING = "accepting"
    DECODING = "decoding"
    FINISHING = "finishing"


@dataclass(frozen=True, slots=True)
class Failure:
    """Why an attempt ended early. `reason` is machine-readable; `incarnation` is the worker to avoid, if any."""

    reason: str
    message: str
    incarnation: str | None = None


@dataclass(slots=True, eq=False)
class Hold:
    """One worker's part in one attempt: takes one of its credits, from placement until the worker let go.

    `pending_tokens` were asked to be prefilled and are not; `pending_blocks` were asked for and may not show in the
    worker's load yet. `told` once a command went out: until then there is nothing to take back. `closing` once it was
    told to let go: its lease is no longer renewed.
    """

    entry: Entry
    ticket: Ticket
    incarnation: str
    pending_tokens: int = 0
    pending_blocks: int = 0
    told: bool = False
    closing: bool = False
    timer: asyncio.TimerHandle | None = None

    @property
    def leaves(self) -> bool:
        """Whether the current attempt is to take over from this one: it is closing, and was not told so."""
        attempt = self.entry.attempt
        return attempt is not None and attempt.leaving is not None and attempt.leaving.hold is self


@dataclass(frozen=True, slots=True)
class Leaving:
    """The attempt that another takes over from, and its hold at the worker that decodes it until the other has room.

    `missed` was drawn meanwhile: it is drawn again elsewhere, or delivered after all where that is refused.
    """

    attempt: Attempt
    hold: Hold
    missed: list[SequenceTokens] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class Attempt:
    """The current attempt at a request. `since_s` is when its stage began; `decoding` once decode sent a token.

    `num_to_read` are the tokens that prefill has to read for it, those ahead of it included; `num_to_send` those that
    its transfer carries. One that `moves` takes over what another worker has decoded; `leaving` until it has room.
    """

    ticket: Ticket
    work: Work
    stage: Stage
    since_s: float
    num_to_read: int = 0
    num_to_send: int = 0
    decoding: bool = False
    finish_reason: FinishReason | None = None
    timer: asyncio.TimerHandle | None = None
    moves: bool = False
    leaving: Leaving | None = None

    def enter(self, stage: Stage, now_s: float) -> float:
        """Go on to `stage`, without a time limit; returns how long the last one took."""
        took_s, self.stage, self.since_s = now_s - self.since_s, stage, now_s
        self.stop_timer()
        return took_s

    def stop_timer(self) -> None:
        if self.timer:
            self.timer.cancel()
            self.timer = None


@dataclass(slots=True)
class Ahead:
    """What was copied to the worker that a request is to move to: K and V of its first `num_tokens`."""

    incarnation: str
    num_tokens: int = 0
    busy: bool = False
    failed: bool = False


@dataclass(slots=True, eq=False)
class Entry:
    """One request, from arrival until nothing of it is left anywhere.

    `seq` is its place in the queue, kept over retries. Each ticket gets the next `num_attempts`; only failed ones, not
    refused ones, are `num_failures`. `refusals` are the loads of workers that had no room, `refusal` is the reason the
    last one gave; `stayed_s` is when one last refused what was to move there. `placement` is the current attempt's, or
    the last one's; `waits_for` is what stood in the way when it was last looked at in the queue. Tokens streamed so far
    are `request.output_token_ids`.

    With `on_copied` it is no request but K and V on their way between two caches: only that is told whether they came.
    """

    request: Request
    stream: RequestStream
    seq: int
    transfer_id: str
    arrived_s: float
    attempt: Attempt | None = None
    num_attempts: int = 0
    num_failures: int = 0
    failure: Failure | None = None
    placement: Placement | None = None
    waits_for: tuple[str, ...] = ()
    avoid: set[str] = field(default_factory=set)
    refusals: dict[str, Load] = field(default_factory=dict)
    refusal: str = ""
    stayed_s: float = float("-inf")
    ahead: Ahead | None = None
    on_copied: Callable[[bool], None] | None = None
    holds: list[Hold] = field(default_factory=list)
    history: list[tuple[LifecycleEvent, float]] = field(default_factory=list)
    hashes: PromptHashes = field(default_factory=PromptHashes, repr=False)
    last_token_s: float | None = None
    ended: bool = False
    finish_reason: FinishReason | None = None
    error: PenstockError | None = None
    deadline_timer: asyncio.TimerHandle | None = None
    unavailable_timer: asyncio.TimerHandle | None = None

    def hold_of(self, ticket: Ticket, incarnation: str) -> Hold:
        return next(hold for hold in self.holds if hold.ticket is ticket and hold.incarnation == incarnation)

    @property
    def is_copy(self) -> bool:
        return self.on_copied is not None

    @property
    def stats(self) -> RequestStats:
        return self.stream.stats

    @property
    def num_tokens(self) -> int:
        """Prompt and everything streamed so far: what an attempt begun now has to prefill."""
        return self.request.num_tokens


@dataclass(slots=True)
class Usage:
    """What the router's holds on one worker add up to."""

    num_credits: int = 0
    pending_tokens: int = 0
    pending_blocks: int = 0


@dataclass(slots=True)
class Counts:
    """Totals since start, by machine-readable reason."""

    placements: Counter[str] = field(default_factory=Counter)
    refusals: Counter[str] = field(default_factory=Counter)
    failures: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    """Messages of workers that were not of a current attempt, by kind of event."""
    release_timeouts: int = 0


class Observer(Protocol):
    """Telemetry's view of the router. Called on the event loop; must not wait."""

    def on_event(self, entry: Entry, event: LifecycleEvent, now_s: float) -> None:
        """At RETRIED `entry.failure`, at REFUSED `entry.refusal`, at FAILED `entry.error` say why; at PLACED
        `entry.placement`."""

    def on_tokens(self, entry: Entry, num_tokens: int, gap_s: float) -> None:
        """Tokens came for a request that had some, `gap_s` after those."""

    def on_transfer(self, entry: Entry, ticket: Ticket, transfer: TransferStats) -> None:
        """The prefill worker told the figures of an attempt's transfer: maybe after the request ended."""

    def on_worker_failure(self, entry: Entry, incarnation: str, reason: str) -> None:
        """A worker gave up an attempt by itself: maybe one that the router had left."""

    def on_cluster_change(self) -> None:
        """Workers or pairs came or went."""


class Ledger:
    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._live: dict[str, Entry] = {}  # by request id
        self._by_transfer: dict[str, Entry] = {}
        self._holds: dict[str, dict[AttemptKey, Hold]] = {}  # by incarnation
        self._usage: dict[str, Usage] = {}
        self._touched: set[str] = set()

    def open(self, entry: Entry) -> None:
        self._live[entry.request.request_id] = entry
        self._by_transfer[entry.transfer_id] = entry
        self.note(entry, LifecycleEvent.ARRIVED, entry.arrived_s)

    def open_copy(self, entry: Entry) -> None:
        """Something is to be held for a copy; it goes when nothing is any more."""
        entry.ended = True
        self._by_transfer[entry.transfer_id] = entry

    def note(self, entry: Entry, event: LifecycleEvent, now_s: float) -> None:
        entry.history.append((event, now_s))
        if not entry.is_copy:
            self._observer.on_event(entry, event, now_s)

    def note_tokens(self, entry: Entry, num_tokens: int, now_s: float) -> None:
        if entry.last_token_s is not None and not entry.is_copy:
            self._observer.on_tokens(entry, num_tokens, now_s - entry.last_token_s)
        entry.last_token_s = now_s

    def note_transfer(self, entry: Entry, ticket: Ticket, transfer: TransferStats) -> None:
        self._observer.on_transfer(entry, ticket, transfer)

    def note_worker_failure(self, entry: Entry, incarnation: str, reason: str) -> None:
        self._observer.on_worker_failure(entry, incarnation, reason)

    def end(self, entry: Entry) -> None:
        """The stream has ended; the entry goes when nothing is held for it any more."""
        entry.ended = True
        del self._live[entry.request.request_id]
        self._forget_if_over(entry)

    def live(self, request_id: str) -> Entry | None:
        return self._live.get(request_id)

    @property
    def num_live(self) -> int:
        return len(self._live)

    @property
    def num_entries(self) -> int:
        """Live ones, and those for which a worker may still hold something."""
        return len(self._by_transfer)

    def entries(self) -> tuple[Entry, ...]:
        return tuple(self._by_transfer.values())

    # ---- holds

    def hold(
        self, entry: Entry, ticket: Ticket, incarnation: str, *, pending_tokens: int = 0, pending_blocks: int = 0
    ) -> Hold:
        hold = Hold(entry, ticket, incarnation, pending_tokens, pending_blocks)
        self._holds.setdefault(incarnation, {})[ticket.key] = hold
        entry.holds.append(hold)
        usage = self._usage.setdefault(incarnation, Usage())
        usage.num_credits += 1
        usage.pending_tokens += pending_tokens
        usage.pending_blocks += pending_blocks
        self._touched.add(incarnation)
        return hold

    def settle(self, hold: Hold) -> None:
        """From here on the worker's own load accounts for it."""
        self._touched.add(hold.incarnation)
        usage = self._usage[hold.incarnation]
        usage.pending_tokens -= hold.pending_tokens
        usage.pending_blocks -= hold.pending_blocks
        hold.pending_tokens = hold.pending_blocks = 0

    def drop(self, hold: Hold) -> None:
        """The worker holds nothing of this attempt any more: its credit is free."""
        self.settle(hold)
        if hold.timer:
            hold.timer.cancel()
        holds = self._holds[hold.incarnation]
        del holds[hold.ticket.key]
        self._usage[hold.incarnation].num_credits -= 1
        if not holds:
            del self._holds[hold.incarnation], self._usage[hold.incarnation]
        hold.entry.holds.remove(hold)
        self._forget_if_over(hold.entry)

    def find(self, incarnation: str, key: AttemptKey) -> Hold | None:
        return self._holds.get(incarnation, {}).get(key)

    def holds_on(self, incarnation: str) -> tuple[Hold, ...]:
        return tuple(self._holds.get(incarnation, {}).values())

    def usage(self, incarnation: str) -> Usage:
        return self._usage.get(incarnation, Usage())

    def take_touched(self) -> set[str]:
        """Workers whose usage has changed since the last call."""
        touched, self._touched = self._touched, set()
        return touched

    def live_transfer_ids(self, incarnation: str) -> tuple[str, ...]:
        return tuple({hold.ticket.transfer_id: None for hold in self.holds_on(incarnation) if not hold.closing})

    def pairs_in_use(self) -> set[tuple[str, str]]:
        """Incarnations of the two workers between which K and V are, or soon will be, on their way."""
        attempts = (entry.attempt for entry in self._by_transfer.values())
        return {
            (attempt.ticket.prefill_incarnation, attempt.ticket.decode_incarnation)
            for attempt in attempts
            if attempt and attempt.stage in (Stage.RESERVING, Stage.PREFILLING, Stage.ACCEPTING)
        }

    def _forget_if_over(self, entry: Entry) -> None:
        if entry.ended and not entry.holds:
            self._by_transfer.pop(entry.transfer_id, None)

    # ---- proof

    def check_integrity(self, queued: Iterable[Entry], credits_granted: Mapping[str, int]) -> None:
        """`IntegrityError` unless entries, holds and credits agree with each other, the queue and the sessions.

        `credits_granted` is by incarnation of connected workers.
        """
        waiting = set(queued)
        for entry in self._by_transfer.values():
            require(not entry.ended or bool(entry.holds), entry, "is over and still in the ledger")
            require(entry.ended != (entry.request.request_id in self._live), entry, "is live and ended at once")
            expected = not entry.ended and entry.attempt is None
            require((entry in waiting) == expected, entry, "is queued if and only if it has no attempt")
            for hold in entry.holds:
                current = entry.attempt is not None and hold.ticket is entry.attempt.ticket
                require(current or hold.closing, entry, f"holds on to {hold.incarnation} for an attempt that is gone")
                require(self.find(hold.incarnation, hold.ticket.key) is hold, entry, "has a hold that is not booked")
        require(waiting <= set(self._live.values()), None, "the queue has entries that are not live")
        self._check_credits(credits_granted)

    def _check_credits(self, granted: Mapping[str, int]) -> None:
        for incarnation, holds in self._holds.items():
            require(incarnation in granted, None, f"something is held on {incarnation}, which is not connected")
            booked = Usage(
                len(holds),
                sum(hold.pending_tokens for hold in holds.values()),
                sum(hold.pending_blocks for hold in holds.values()),
            )
            require(self._usage[incarnation] == booked, None, f"usage of {incarnation} does not add up")
            require(booked.num_credits <= granted[incarnation], None, f"{incarnation} is given more than its credits")
            for hold in holds.values():
                known = self._by_transfer.get(hold.ticket.transfer_id)
                require(known is hold.entry, None, f"{incarnation} holds something for a request that is gone")


def require(condition: bool, entry: Entry | None, message: str) -> None:
    if not condition:
        raise IntegrityError(f"request {entry.request.request_id}: {message}" if entry else f"ledger: {message}")
