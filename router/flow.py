"""One attempt at a request, from its placement to its outcome: what is said to the two workers, and what they answer.

```
router              decode worker                prefill worker
  ── Reserve ─────────▶
  ◀──────── Reserved ──
  ── Prefill ────────────────────────────────────────▶
  ◀────────────── Prefilled (first token, record) ────   the token goes to the client at once
  ── Accept ──────────▶
  ◀──────── Accepted ──
  ── Release ────────────────────────────────────────▶
  ◀──────── Tokens ... ◀────────── Released (figures) ─
```
A local attempt is Prefill, Prefilled, Tokens with one worker.

A request moves from one decode worker to another by an attempt like the others, in which the first worker has the part
of the prefill worker: K and V are in its cache (docs/adr/0005).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

from core.clock import Clock
from core.events import LifecycleEvent
from core.messages import (
    Accept,
    Accepted,
    AttemptFailed,
    Cancel,
    Event,
    Prefill,
    Prefilled,
    Refused,
    Release,
    Released,
    Reserve,
    Reserved,
    SequenceTokens,
    StepTokens,
)
from core.request import FinishReason
from router.attempt import Outcome, Refusal, Told, TooSlow, add_transfer, ticket_of, work_of
from router.config import DispatchConfig
from router.learning import Learner
from router.ledger import Attempt, Counts, Entry, Failure, Hold, Leaving, Ledger, Stage
from router.pairs import TRANSFER_FAULTS
from router.policies.model import Placement, Route
from router.policies.search import num_blocks_for
from router.pulling import Puller
from router.teller import Teller
from router.workers import Workers

AttemptEvent = Reserved | Refused | Prefilled | Accepted | Released | SequenceTokens | AttemptFailed


class AttemptFlow:
    """Drives the attempts of all requests. `on_outcome` hears once of every attempt begun, unless it was fenced.

    When it hears, the attempt is off the entry and both workers were told to let go: it may end the request or queue
    it again, but must not begin another attempt before it returns.
    """

    def __init__(
        self,
        config: DispatchConfig,
        *,
        workers: Workers,
        ledger: Ledger,
        counts: Counts,
        learner: Learner,
        clock: Clock,
        on_outcome: Callable[[Entry, Outcome], None],
    ) -> None:
        self._config = config
        self._workers = workers
        self._ledger = ledger
        self._counts = counts
        self.learner = learner
        self._clock = clock
        self._on_outcome = on_outcome
        self._puller = Puller(self, workers=workers, ledger=ledger, counts=counts, clock=clock)
        self._teller = Teller(config, workers=workers, ledger=ledger, counts=counts, on_dropped=self._on_dropped)

    # ---- begin and end

    def start(self, entry: Entry, placement: Placement) -> None:
        """Begin the next attempt. Both workers must be connected."""
        route, attempt = placement.route, self._new_attempt(entry, placement.route)
        ticket, num_tokens = attempt.ticket, entry.num_tokens
        ahead = self.learner.num_tokens_ahead(route.prefill)
        attempt.num_to_read = ahead + num_tokens - placement.forecast.num_cached_prefill
        if route.local:
            num_blocks = self._num_blocks(entry, route.decode)
            hold = self._ledger.hold(entry, ticket, route.decode, pending_tokens=num_tokens, pending_blocks=num_blocks)
            self._prefill(entry, attempt, hold, num_skipped_tokens=0)
            return
        self._ledger.hold(entry, ticket, route.prefill, pending_tokens=num_tokens)
        self._reserve(entry, attempt)

    def move(self, entry: Entry, route: Route) -> None:
        """Begin an attempt that takes over from the current one, which decodes on worker `route.prefill`.

        That goes on until the other worker has room; where there is none, nothing has happened.
        """
        before = entry.attempt
        assert before is not None, "only what decodes can move"
        hold = entry.hold_of(before.ticket, route.prefill)
        before.stop_timer()
        hold.closing = True
        attempt = self._new_attempt(entry, route)
        attempt.leaving, attempt.moves = Leaving(before, hold), True
        self._reserve(entry, attempt)

    def copy(self, entry: Entry, route: Route) -> None:
        """Begin to send what worker `route.prefill` has in its cache to that of worker `route.decode`."""
        attempt = self._new_attempt(entry, route)
        attempt.moves = True
        self._ledger.hold(entry, attempt.ticket, route.prefill)
        self._reserve(entry, attempt)

    def _new_attempt(self, entry: Entry, route: Route) -> Attempt:
        entry.num_attempts += 1
        stage = Stage.PREFILLING if route.local else Stage.RESERVING
        entry.attempt = attempt = Attempt(ticket_of(entry, route), work_of(entry), stage, self._clock())
        attempt.num_to_send = entry.num_tokens
        stats = entry.stats
        stats.prefill_worker = self._workers.hello(route.prefill).worker_id
        stats.decode_worker = self._workers.hello(route.decode).worker_id
        stats.num_attempts = entry.num_failures + 1
        return attempt

    def _reserve(self, entry: Entry, attempt: Attempt) -> None:
        decode = attempt.ticket.decode_incarnation
        hold = self._ledger.hold(entry, attempt.ticket, decode, pending_blocks=self._num_blocks(entry, decode))
        if entry.is_copy:  # the worker is done when its first token is: it only keeps K and V
            work = replace(attempt.work, sampling=replace(attempt.work.sampling, max_tokens=1))
            self._teller.tell(hold, Reserve(attempt.ticket, work, copy=True))
        else:
            self._teller.tell(hold, Reserve(attempt.ticket, attempt.work))
        self._limit(entry, self._config.reserve_timeout_s, "reserve_timeout", decode)

    def fence(self, entry: Entry, reason: str) -> None:
        """Take the attempt off the entry: both workers are told to let go, and nothing they still say counts."""
        attempt = entry.attempt
        if attempt is None:
            return
        entry.attempt = None
        attempt.stop_timer()
        if attempt.leaving and attempt.leaving.hold in entry.holds:
            self._teller.let_go(attempt.leaving.hold, Cancel(attempt.leaving.attempt.ticket, reason))
        for hold in [*entry.holds]:
            if hold.ticket is attempt.ticket and not hold.closing:
                self._teller.let_go(hold, Cancel(attempt.ticket, reason))

    def _fail(self, entry: Entry, reason: str, message: str, incarnation: str | None = None) -> None:
        attempt = entry.attempt
        self.fence(entry, reason)
        if attempt and reason in TRANSFER_FAULTS:
            self._workers.transfer_ended(attempt.ticket, well=False)
        self._on_outcome(entry, Failure(reason, message, incarnation))

    def _complete(self, entry: Entry, reason: FinishReason) -> None:
        if entry.attempt:
            entry.attempt.stop_timer()
        entry.attempt = None
        self._on_outcome(entry, reason)

    # ---- what workers say

    def on_event(self, incarnation: str, event: Event) -> None:
        match event:
            case StepTokens(sequences):
                self._learn_step(incarnation, sequences)
                for sequence in sequences:
                    self._on_attempt_event(incarnation, sequence)
            case Reserved() | Refused() | Prefilled() | Accepted() | Released() | AttemptFailed():
                self._on_attempt_event(incarnation, event)
            case _:
                self._counts.dropped[type(event).__name__] += 1

    def on_lost(self, incarnation: str, reason: str) -> None:
        for hold in self._ledger.holds_on(incarnation):
            self._teller.drop(hold)
            if not hold.closing or hold.leaves:
                self._fail(hold.entry, "session_lost", f"lost the worker: {reason}", incarnation)

    def on_pair_down(self, prefill: str, decode: str, epoch: int, reason: str) -> None:
        """Ends the attempts whose KV was still to come on that channel."""
        for hold in self._ledger.holds_on(decode):
            ticket, attempt = hold.ticket, hold.entry.attempt
            if hold.closing or attempt is None or (ticket.prefill_incarnation, ticket.pair_epoch) != (prefill, epoch):
                continue
            if attempt.stage in (Stage.RESERVING, Stage.PREFILLING, Stage.ACCEPTING):
                self._fail(hold.entry, "pair_down", f"the channel broke: {reason}")

    def _on_attempt_event(self, incarnation: str, event: AttemptEvent) -> None:
        hold = self._ledger.find(incarnation, event.key)
        attempt = hold.entry.attempt if hold else None
        match event:
            case Released() if hold:
                self._on_released(hold, event)
            case AttemptFailed() if hold:
                self._on_failed(hold, event)
            case Refused() if hold and attempt and not hold.closing and attempt.stage in _REFUSABLE:
                self._on_refused(hold, event)
            case Reserved() if hold and attempt and self._expects(hold, attempt, Stage.RESERVING):
                self._on_reserved(hold, attempt, event)
            case Prefilled() if hold and attempt and self._expects(hold, attempt, Stage.PREFILLING):
                self._on_prefilled(hold, attempt, event)
            case Accepted() if hold and attempt and self._expects(hold, attempt, Stage.ACCEPTING):
                self._on_accepted(hold, attempt, event)
            case SequenceTokens() if hold and attempt and not hold.closing:
                self._on_tokens(hold, attempt, event)
            case SequenceTokens() if hold and attempt and attempt.leaving and hold.leaves:
                attempt.leaving.missed.append(event)
            case _:
                self._counts.dropped[type(event).__name__] += 1

    def _expects(self, hold: Hold, attempt: Attempt, stage: Stage) -> bool:
        """Whether this worker's word is due now: of the current attempt, in this stage, from that half."""
        ticket = attempt.ticket
        speaker = ticket.prefill_incarnation if stage is Stage.PREFILLING else ticket.decode_incarnation
        return hold.ticket is ticket and not hold.closing and attempt.stage is stage and hold.incarnation == speaker

    def _on_reserved(self, hold: Hold, attempt: Attempt, event: Reserved) -> None:
        now_s = self._clock()
        hold.entry.stats.reserve_s = attempt.enter(Stage.PREFILLING, now_s)
        attempt.num_to_send -= event.num_skipped_tokens
        self._ledger.settle(hold)
        self._ledger.note(hold.entry, LifecycleEvent.RESERVED, now_s)
        if attempt.leaving:
            self._hand_over(hold.entry, attempt, attempt.leaving, event.num_skipped_tokens)
            return
        entry, prefill = hold.entry, hold.entry.hold_of(attempt.ticket, attempt.ticket.prefill_incarnation)

        def begin() -> None:
            if entry.attempt is attempt:
                self._prefill(entry, attempt, prefill, event.num_skipped_tokens)

        self._puller.pull(entry, attempt, begin)

    def _hand_over(self, entry: Entry, attempt: Attempt, leaving: Leaving, num_skipped_tokens: int) -> None:
        """The command that begins the attempt at the worker also ends the one before there."""
        attempt.leaving = None
        if leaving.hold not in entry.holds:
            self._fail(entry, "ended", "the worker that decoded has ended it meanwhile", leaving.hold.incarnation)
            return
        self._teller.drop(leaving.hold)
        hold = self._ledger.hold(entry, attempt.ticket, leaving.hold.incarnation)
        self._prefill(entry, attempt, hold, num_skipped_tokens)

    def _on_refused(self, hold: Hold, event: Refused) -> None:
        entry, attempt = hold.entry, hold.entry.attempt
        self._teller.drop(hold)
        if attempt and attempt.leaving and attempt.leaving.hold in entry.holds:
            self._stay(entry, attempt, attempt.leaving, event)
            return
        self.fence(entry, "refused")
        self._on_outcome(entry, Refusal(hold.incarnation, event.reason))

    def _stay(self, entry: Entry, attempt: Attempt, leaving: Leaving, event: Refused) -> None:
        """There is no room elsewhere: the attempt before is the current one again, with what it drew meanwhile."""
        attempt.stop_timer()
        self._counts.refusals[event.reason] += 1
        entry.refusal, entry.stayed_s = event.reason, self._clock()
        if load := self._workers.load(attempt.ticket.decode_incarnation):
            entry.refusals[attempt.ticket.decode_incarnation] = load
        entry.attempt, leaving.hold.closing = leaving.attempt, False
        self._ledger.note(entry, LifecycleEvent.STAYED, entry.stayed_s)
        for tokens in leaving.missed:
            if entry.attempt is leaving.attempt:
                self._on_tokens(leaving.hold, leaving.attempt, tokens)

    def _on_prefilled(self, hold: Hold, attempt: Attempt, event: Prefilled) -> None:
        entry, ticket = hold.entry, attempt.ticket
        if event.finish is None and event.record is None and not ticket.local:
            self._fail(entry, "no_record", "the prefill worker sent no commit record", hold.incarnation)
            return
        now_s = self._clock()
        entry.stats.prefill_s = attempt.enter(Stage.DECODING if ticket.local else Stage.ACCEPTING, now_s)
        if not attempt.moves:
            self.learner.on_prefilled(hold.incarnation, attempt.num_to_read, entry.stats.prefill_s)
        self._ledger.settle(hold)
        if entry.stats.ttft_s is None:
            entry.stats.ttft_s = now_s - entry.arrived_s
            entry.stats.num_cached_tokens = min(event.num_cached_tokens, entry.request.num_prompt_tokens)
            self._ledger.note(entry, LifecycleEvent.FIRST_TOKEN, now_s)
        else:
            self._ledger.note(entry, LifecycleEvent.RESUMED, now_s)
        told = Told((event.first_token_id,), event.logprobs, event.prompt_logprobs)
        if not self._deliver(entry, told, now_s):
            return
        if event.finish:
            self._teller.drop(hold)
            self.fence(entry, "finished")
            self._complete(entry, event.finish)
        elif event.record and not ticket.local:
            decode = entry.hold_of(ticket, ticket.decode_incarnation)
            deadline_s = self._config.accept_deadline_s
            self._teller.tell(decode, Accept(ticket, event.record, event.first_token_id, deadline_s))
            self._limit(entry, self._config.accept_timeout_s, "accept_timeout", ticket.decode_incarnation)

    def _on_accepted(self, hold: Hold, attempt: Attempt, event: Accepted) -> None:
        entry, ticket, now_s = hold.entry, attempt.ticket, self._clock()
        took_s = attempt.enter(Stage.DECODING, now_s) + (entry.stats.reserve_s or 0.0)
        if entry.is_copy:
            took_s += entry.stats.prefill_s or 0.0
        if entry.is_copy or not attempt.moves:
            self.learner.on_handover(ticket.prefill_incarnation, ticket.decode_incarnation, attempt.num_to_send, took_s)
        entry.stats.commit_wait_s = event.commit_wait_s
        self._workers.transfer_ended(ticket, well=True)
        self._ledger.note(entry, LifecycleEvent.ACCEPTED, now_s)
        self._teller.let_go(entry.hold_of(ticket, ticket.prefill_incarnation), Release(ticket))

    def _on_tokens(self, hold: Hold, attempt: Attempt, event: SequenceTokens) -> None:
        entry, now_s = hold.entry, self._clock()
        if attempt.stage is not Stage.DECODING or hold.incarnation != attempt.ticket.decode_incarnation:
            message = f"tokens came while the attempt was {attempt.stage.value}"
            self._fail(entry, "out_of_order", message, hold.incarnation)
            return
        if not attempt.decoding:
            attempt.decoding = True
            entry.stats.first_decode_step_s = now_s - attempt.since_s
            self._ledger.note(entry, LifecycleEvent.FIRST_DECODE_TOKEN, now_s)
        if self._deliver(entry, Told(event.token_ids, event.logprobs), now_s) and event.finish:
            attempt.enter(Stage.FINISHING, now_s)
            attempt.finish_reason = event.finish
            self._teller.drop(hold)
            self._await_figures(entry, attempt, event.finish)

    def _on_released(self, hold: Hold, event: Released) -> None:
        if event.transfer:
            add_transfer(hold.entry, event.transfer)
            self._ledger.note_transfer(hold.entry, hold.ticket, event.transfer)
        self._teller.drop(hold)
        if not hold.closing:
            self._fail(hold.entry, "released", "the worker let go without being told to", hold.incarnation)

    def _on_failed(self, hold: Hold, event: AttemptFailed) -> None:
        self._ledger.note_worker_failure(hold.entry, hold.incarnation, event.reason)
        self._teller.drop(hold)
        if not hold.closing:
            self._fail(hold.entry, event.reason, event.message, hold.incarnation)

    # ---- small steps

    def _learn_step(self, incarnation: str, sequences: tuple[SequenceTokens, ...]) -> None:
        """From one of a step's sequences: all have waited for the same step."""
        first = sequences[0]
        hold = self._ledger.find(incarnation, first.key)
        attempt = hold.entry.attempt if hold else None
        last_s = hold.entry.last_token_s if hold else None
        if attempt and attempt.decoding and first.token_ids and last_s is not None:
            self.learner.on_step(incarnation, (self._clock() - last_s) / len(first.token_ids))

    def _prefill(self, entry: Entry, attempt: Attempt, hold: Hold, num_skipped_tokens: int) -> None:
        self._teller.tell(hold, Prefill(attempt.ticket, attempt.work, num_skipped_tokens, attempt.moves, entry.is_copy))
        self._ledger.note(entry, LifecycleEvent.PREFILL_SENT, self._clock())

    def _num_blocks(self, entry: Entry, incarnation: str) -> int:
        return num_blocks_for(entry.num_tokens + 1, self._workers.hello(incarnation).layout.block_size)

    def _deliver(self, entry: Entry, told: Told, now_s: float) -> bool:
        """Tokens to the client; False where that ended the attempt, for the client does not read."""
        if not entry.stream.push(told.token_ids, logprobs=told.logprobs, prompt_logprobs=told.prompt_logprobs):
            self.fence(entry, "client_too_slow")
            self._on_outcome(entry, TooSlow())
            return False
        entry.request.output_token_ids.extend(told.token_ids)
        self._ledger.note_tokens(entry, len(told.token_ids), now_s)
        return True

    def _await_figures(self, entry: Entry, attempt: Attempt, reason: FinishReason) -> None:
        """A short answer may be complete before the transfer's figures are told. Its deadline is met either way."""
        if entry.deadline_timer:
            entry.deadline_timer.cancel()
        if any(hold.ticket is attempt.ticket for hold in entry.holds):
            loop = asyncio.get_running_loop()
            attempt.timer = loop.call_later(self._config.stats_grace_s, self._complete, entry, reason)
        else:
            self._complete(entry, reason)

    def _on_dropped(self, hold: Hold) -> None:
        attempt = hold.entry.attempt
        if attempt and attempt.ticket is hold.ticket and attempt.finish_reason and attempt.timer:
            self._complete(hold.entry, attempt.finish_reason)

    def _limit(self, entry: Entry, seconds: float, reason: str, incarnation: str) -> None:
        """The attempt fails unless its stage is over in time."""
        assert entry.attempt is not None
        message = f"no answer within {seconds:g} s"
        loop = asyncio.get_running_loop()
        entry.attempt.timer = loop.call_later(seconds, self._fail, entry, reason, message, incarnation)


_REFUSABLE = (Stage.RESERVING, Stage.PREFILLING)
