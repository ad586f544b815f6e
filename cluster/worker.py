"""A worker: both halves over one engine, and the loop that turns."""

from __future__ import annotations

import logging
import queue
from dataclasses import dataclass

from cluster.load import load_of
from cluster.session import RouterSession
from cluster.steps import Step, StepHook, pass_by
from core.clock import Clock
from core.errors import IntegrityError, PenstockError, TransferError
from core.messages import (
    Accept,
    AttemptFailed,
    CacheFlushed,
    Cancel,
    Command,
    Connect,
    Disconnect,
    Drain,
    Drained,
    FlushCache,
    Heartbeat,
    Load,
    PairDown,
    PairUp,
    Prefill,
    PromptPart,
    Refused,
    Release,
    Released,
    Reserve,
    WorkerRole,
)
from core.ticket import AttemptKey, Ticket, engine_id, lane_of
from core.trace_context import log_fields
from decode_worker.half import DecodeHalf
from engine.engine import Engine
from engine.plan import Plan, StepOutput, StepResult
from kv_transfer.events import KVEvent, TransferFailed, TransferReady
from kv_transfer.plane import KVPlane
from prefill_worker.half import PrefillHalf

log = logging.getLogger(__name__)

MAX_FAILED_STEPS = 3
"""Steps that may fail in a row before the worker ends, to be started anew."""
EXPIRY_INTERVAL_S = 0.25
"""How late the end of a lease or deadline may be noticed."""
STEP_OF = {Reserve: Step.RESERVE, Prefill: Step.PREFILL, Accept: Step.ACCEPT, Release: Step.RELEASE}


@dataclass(frozen=True, slots=True)
class SessionOpened:
    session: RouterSession


@dataclass(frozen=True, slots=True)
class SessionClosed:
    session: RouterSession


@dataclass(frozen=True, slots=True)
class FromRouter:
    session: RouterSession
    command: Command


@dataclass(frozen=True, slots=True)
class Stop:
    """End the loop at once."""


Message = SessionOpened | SessionClosed | FromRouter | KVEvent | Drain | Stop


class Worker:
    """Schedule, run, update, publish.

    One engine thread calls `run`; every other thread talks to it through `post`. The blocks of an attempt are owned by
    one of the two halves; the end of its session, of its lease or of its pair frees them.
    """

    def __init__(
        self,
        engine: Engine,
        kv: KVPlane,
        role: WorkerRole,
        incarnation: str,
        clock: Clock,
        on_step: StepHook = pass_by,
    ) -> None:
        self._engine, self._kv, self._role, self._incarnation, self._clock = engine, kv, role, incarnation, clock
        self._on_step = on_step
        self._prefill = PrefillHalf(engine.scheduler, kv.sender)
        self._decode = DecodeHalf(engine.scheduler, engine.pool, kv.receiver)
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._sessions: set[RouterSession] = set()
        self._owners: dict[AttemptKey, RouterSession] = {}
        self._channels: dict[RouterSession, dict[tuple[str, str], int]] = {}  # latest epochs that each asked for
        self._parts: dict[AttemptKey, list[int]] = {}
        self._deadlines: dict[AttemptKey, float] = {}
        self._draining_until: float | None = None
        self._stopped = False
        self._num_failed_steps = 0
        self._expire_at = 0.0

    def post(self, message: Message) -> None:
        """Say something to the engine thread. Thread-safe.

        What must not wait for the end of a step is done here and now: a Cancel stops the transfer (the engine does the
        rest), a Heartbeat renews leases.
        """
        match message:
            case FromRouter(_, Heartbeat(live)):
                self._kv.renew(live, self._clock())
                return
            case FromRouter(_, Cancel(ticket, _)):
                self._kv.cancel(ticket.key)
        self._inbox.put(message)

    def run(self) -> None:
        """Turn until stopped or drained; the sessions end with it.

        Raises the error of the last step where too many fail in a row.
        """
        busy = False
        try:
            while not self._stopped:
                busy = self.turn(wait=not busy)
        finally:
            self._flush()
            for session in self._sessions:
                session.close()

    def turn(self, wait: bool) -> bool:
        """One turn of the loop, which begins with a message where it may `wait` for one; whether a step was run."""
        self._take_messages(wait)
        plan = self._engine.scheduler.schedule()
        if plan and (result := self._run_step(plan)):
            self._publish(self._engine.scheduler.update(plan, result))
            self._fail_undrawn(result)
        self._expire()
        self._flush()
        return bool(plan)

    # ---- one turn

    def _take_messages(self, wait: bool) -> None:
        """Handle all that has come; with `wait`, something comes first, or it is time to look at leases."""
        try:
            message = self._inbox.get(timeout=EXPIRY_INTERVAL_S) if wait else self._inbox.get_nowait()
            while True:
                self._handle(message)
                message = self._inbox.get_nowait()
        except queue.Empty:
            return

    def _run_step(self, plan: Plan) -> StepResult | None:
        try:
            result = self._engine.runner.run(plan, lambda layer: self._push(plan, layer))
        except Exception as error:
            log.exception("a step of %d requests failed", len(plan.entries))
            self._num_failed_steps += 1
            failed = {request.request_id for request in self._engine.scheduler.abandon(plan)}
            for key in [key for key in self._keys() if engine_id(key) in failed]:
                self._fail(key, "internal", f"a step failed: {error}")
            if self._num_failed_steps >= MAX_FAILED_STEPS:
                raise
            return None
        self._num_failed_steps = 0
        return result

    def _fail_undrawn(self, result: StepResult) -> None:
        """Requests for which nothing could be drawn, while the others of the step go on."""
        failures = {request_id: drawn.failure for request_id, drawn in result.drawn.items() if drawn.failure}
        for key in [key for key in self._keys() if engine_id(key) in failures]:
            self._fail(key, "grammar", failures[engine_id(key)])

    def _push(self, plan: Plan, layer: int) -> None:
        if self._prefill.keys():
            self._on_step(Step.PUSH, layer)
        self._prefill.push(plan, layer)

    def _publish(self, outputs: list[StepOutput]) -> None:
        decoded = [output for output in outputs if not self._prefill.publish(output)]
        if len(decoded) < len(outputs):
            self._on_step(Step.COMMIT)
        if decoded:
            self._on_step(Step.TOKENS)
        self._decode.publish(decoded)

    def _expire(self) -> None:
        now = self._clock()
        if now < self._expire_at:
            return
        self._expire_at = now + EXPIRY_INTERVAL_S
        for key, reason in self._kv.expired(now):
            self._fail(key, reason, f"{reason.replace('_', ' ')} on worker {self._incarnation}")
        for key in [key for key, deadline in self._deadlines.items() if now >= deadline]:
            self._fail(key, "deadline_exceeded", "the deadline of the request is over")
        self._deadlines = {key: deadline for key, deadline in self._deadlines.items() if self._is_live(key)}
        self._owners = {key: owner for key, owner in self._owners.items() if self._is_live(key) or key in self._parts}
        if not self._keys():
            self.check_integrity()  # nothing is wanted, so nothing may be held: a leak ends the worker, loudly
        if self._draining_until is not None and (now >= self._draining_until or not self._keys()):
            for session in self._sessions:
                session.emit(Drained())
            self._stopped = True

    def _flush(self) -> None:
        load, index = self.load(), self._engine.pool.index
        changes = index.take_changes() if index is not None else None
        for session in self._sessions:
            if changes is not None:
                session.emit(changes)
            session.flush(load)

    # ---- messages

    def _handle(self, message: Message) -> None:
        match message:
            case FromRouter(session, command):
                if session in self._sessions:  # not a straggler of one that is closed
                    self._obey(session, command)
            case SessionOpened(session):
                self._sessions.add(session)
                if self._engine.pool.index is not None:
                    session.emit(self._engine.pool.index.snapshot())
            case SessionClosed(session):
                self._sessions.discard(session)
                for pair, epoch in self._channels.pop(session, {}).items():
                    if lane_of(epoch):  # else whatever router comes next replaces it
                        self._kv.disconnect(pair, epoch)
                for key in [key for key, owner in self._owners.items() if owner is session]:
                    self._drop(key)
            case PairUp() | PairDown():
                for session in self._sessions:
                    session.emit(message)
            case TransferReady(key, commit_wait_s):
                self._decode.join(key, commit_wait_s)
            case TransferFailed(key, reason, text):
                self._fail(key, reason, text)
            case Drain(deadline_s):
                self._draining_until = self._clock() + deadline_s
            case Stop():
                self._stopped = True

    def _obey(self, session: RouterSession, command: Command) -> None:
        if step := STEP_OF.get(type(command)):
            self._on_step(step)
        match command:
            case Connect(prefill, decode, epoch):
                self._channels.setdefault(session, {})[prefill, decode] = epoch
                self._kv.connect(command)
            case Disconnect(prefill, decode, epoch):
                self._kv.disconnect((prefill, decode), epoch)
            case PromptPart(ticket, offset, token_ids):
                if not self._is_live(ticket.key):  # else it was said again after a reconnect
                    part = self._parts.setdefault(ticket.key, [])
                    del part[offset:]
                    part.extend(token_ids)
                    self._owners[ticket.key] = session
            case Reserve() | Prefill():
                self._admit(session, command)
            case Accept():
                self._decode.accept(command)
            case Release(ticket) | Cancel(ticket, _):
                self._release(session, ticket.key)
            case Drain():
                self._handle(command)
            case FlushCache():
                session.emit(CacheFlushed(self._engine.pool.flush()))

    def _admit(self, session: RouterSession, command: Reserve | Prefill) -> None:
        """Start an attempt, or say why not. Either way nothing is left half done."""
        ticket, key = command.ticket, command.ticket.key
        if self._is_live(key):
            return  # said again after a reconnect
        token_ids = self._parts.pop(key, []) + list(command.work.token_ids)
        self._owners[key] = session
        if command.work.timeout_s is not None:
            self._deadlines[key] = self._clock() + command.work.timeout_s
        if isinstance(command, Reserve) or not command.handover:
            self._end_older(ticket)
        log.debug("request %s, attempt %d", ticket.request_id, ticket.attempt, extra=log_fields(ticket.traceparent))
        try:
            if refusal := self._refusal(command, token_ids):
                session.emit(refusal)
                return
            self._engine.runner.prepare(command.work.sampling)
            if isinstance(command, Reserve):
                self._decode.reserve(command, token_ids, session.emit)
            elif ticket.local:
                self._decode.start_local(command, token_ids, session.emit)
            else:
                self._prefill.start(command, token_ids, session.emit)
        except PenstockError as error:
            self._drop(key)
            reason = error.reason if isinstance(error, TransferError) else "invalid"
            log.info("request %s is refused: %s", ticket.request_id, error, extra=log_fields(ticket.traceparent))
            session.emit(AttemptFailed(key, reason, str(error)))
        finally:  # one that hands over has taken what it needs of the earlier one
            self._end_older(ticket)

    def _end_older(self, ticket: Ticket) -> None:
        """The router has given up earlier attempts at the same transfer: none may hold blocks beside this one."""
        for key in [key for key in self._owners if key[0] == ticket.transfer_id and key[1] < ticket.attempt]:
            self._fail(key, "stale_attempt", f"attempt {ticket.attempt} came after attempt {key[1]}")

    def _refusal(self, command: Reserve | Prefill, token_ids: list[int]) -> Refused | AttemptFailed | None:
        """Why this worker does not take the attempt; a Refused goes back to the router's queue."""
        ticket, work, me = command.ticket, command.work, self._incarnation
        mine = ticket.decode_incarnation if isinstance(command, Reserve) else ticket.prefill_incarnation
        if mine != me:
            return AttemptFailed(ticket.key, "wrong_incarnation", f"the ticket is for worker {mine}, this is {me}")
        decodes = isinstance(command, Reserve) or ticket.local  # who decodes may read a prompt itself
        needed = WorkerRole.DECODE if decodes else WorkerRole.PREFILL
        hands_over = isinstance(command, Prefill) and command.handover and not ticket.local
        in_every_role = hands_over or (isinstance(command, Reserve) and command.copy)
        if self._role not in (WorkerRole.MIXED, needed) and not in_every_role:
            return AttemptFailed(ticket.key, "wrong_role", f"a {self._role.value} worker does not do this")
        if any(key[0] == ticket.transfer_id and key[1] > ticket.attempt for key in self._keys()):
            return AttemptFailed(ticket.key, "stale_attempt", "a later attempt is here already")
        if len(token_ids) != work.prompt_offset + len(work.token_ids):
            text = f"{len(token_ids)} prompt tokens came, {work.prompt_offset + len(work.token_ids)} were announced"
            return AttemptFailed(ticket.key, "invalid", text)
        if not 0 < len(token_ids) < self._engine.max_model_len:
            text = f"{len(token_ids)} prompt tokens, must be in [1, {self._engine.max_model_len})"
            return AttemptFailed(ticket.key, "invalid", text)
        if self._draining_until is not None and not hands_over:
            return Refused(ticket.key, "draining")
        return None

    def _release(self, session: RouterSession, key: AttemptKey) -> None:
        """Answered even where nothing is held: the router may have said it before."""
        if key in self._prefill:
            self._prefill.release(key)
        elif key in self._decode:
            self._decode.release(key)
        else:
            session.emit(Released(key))
        self._forget(key)

    # ---- ends of attempts

    def _fail(self, key: AttemptKey, reason: str, message: str) -> None:
        self._prefill.fail(key, reason, message)
        self._decode.fail(key, reason, message)
        self._forget(key)

    def _drop(self, key: AttemptKey) -> None:
        self._prefill.drop(key)
        self._decode.drop(key)
        self._forget(key)

    def _forget(self, key: AttemptKey) -> None:
        self._parts.pop(key, None)
        self._owners.pop(key, None)
        self._deadlines.pop(key, None)

    def _is_live(self, key: AttemptKey) -> bool:
        return key in self._prefill or key in self._decode

    def _keys(self) -> list[AttemptKey]:
        return [*self._prefill.keys(), *self._decode.keys()]

    # ---- state

    def load(self) -> Load:
        return load_of(self._engine, draining=self._draining_until is not None)

    def check_integrity(self) -> None:
        """`IntegrityError` where something is held for nobody. Engine thread, or while it does not run."""
        self._engine.scheduler.check_integrity()
        self._kv.check_integrity()
        live = {engine_id(key) for key in self._keys()}
        if stray := set(self._engine.scheduler.requests) ^ live:
            raise IntegrityError(f"attempts and the scheduler's requests differ by {sorted(stray)}")
        for half, held in ((self._prefill, self._kv.sender.keys()), (self._decode, self._kv.receiver.keys())):
            if stray_keys := set(half.keys()) ^ set(held):
                raise IntegrityError(f"attempts and their transfers differ by {sorted(stray_keys)}")
        if orphans := set(self._keys()) - set(self._owners):
            raise IntegrityError(f"attempts of no session: {sorted(orphans)}")
