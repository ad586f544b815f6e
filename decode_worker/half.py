"""The receiving half of a worker: room is reserved, K and V are verified, and tokens are written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from core.messages import (
    Accept,
    Accepted,
    AttemptFailed,
    Event,
    Prefill,
    Prefilled,
    Refused,
    Released,
    Reserve,
    Reserved,
    SequenceTokens,
    StepTokens,
)
from core.request import Request
from core.ticket import AttemptKey, Ticket, engine_id
from engine.block_pool import BlockPool
from engine.plan import StepOutput
from engine.scheduler import Scheduler
from kv_transfer.receiver import KVReceiver

Emit = Callable[[Event], None]


@dataclass(slots=True)
class _Attempt:
    ticket: Ticket
    request: Request
    emit: Emit
    first_token_id: int | None = None


class DecodeHalf:
    """Attempts decoded here: those whose K and V come from a prefill worker, and local ones, prefilled here too.

    Owns their blocks from `reserve` (or `start_local`) until the request ends, the router releases or cancels the
    attempt, or its lease ends. While K and V arrive, the receiver may write into them; after `drop` returns it may not.
    Called by the engine thread alone, but for `KVReceiver`'s own threads.
    """

    def __init__(self, scheduler: Scheduler, pool: BlockPool, receiver: KVReceiver) -> None:
        self._scheduler, self._pool, self._receiver = scheduler, pool, receiver
        self._attempts: dict[str, _Attempt] = {}  # by the scheduler's request id

    def __contains__(self, key: AttemptKey) -> bool:
        return engine_id(key) in self._attempts

    def keys(self) -> list[AttemptKey]:
        return [attempt.ticket.key for attempt in self._attempts.values()]

    def reserve(self, command: Reserve, token_ids: list[int], emit: Emit) -> None:
        """Hold blocks for the prompt, or refuse and hold nothing. Raises TransferError where the channel is not up.

        A prefix that is cached here is pinned, and need not be sent.
        """
        attempt, key = _attempt(command, token_ids, emit), command.ticket.key
        request = attempt.request
        if not self._scheduler.reserve(request):
            emit(Refused(key, "no_room"))
            return
        self._attempts[request.request_id] = attempt
        num_skipped = request.num_computed_tokens
        try:
            table = self._pool.table(request.request_id)
            self._receiver.begin(command.ticket, table, len(token_ids), token_ids[:num_skipped])
        except BaseException:
            self.drop(key)
            raise
        emit(Reserved(key, num_skipped))

    def start_local(self, command: Prefill, token_ids: list[int], emit: Emit) -> None:
        attempt = _attempt(command, token_ids, emit)
        self._receiver.begin_local(command.ticket)
        self._attempts[attempt.request.request_id] = attempt
        self._scheduler.add(attempt.request)

    def accept(self, command: Accept) -> None:
        """Compare what came with what was sent; the receiver tells the outcome. A repeated Accept changes nothing."""
        attempt = self._attempts.get(engine_id(command.ticket.key))
        if attempt is not None and attempt.first_token_id is None:
            attempt.first_token_id = command.first_token_id
            self._receiver.accept(command.ticket.key, command.record, command.deadline_s)

    def join(self, key: AttemptKey, commit_wait_s: float) -> None:
        """All K and V are there and verified: the request joins the running batch."""
        attempt = self._attempts.get(engine_id(key))
        if attempt is None or attempt.first_token_id is None:
            return
        output = self._scheduler.join(attempt.request.request_id, attempt.first_token_id)
        attempt.emit(Accepted(key, commit_wait_s))
        if output.finish_reason is not None:
            attempt.emit(StepTokens((SequenceTokens(key, (), output.finish_reason),)))
            self.drop(key)

    def publish(self, outputs: list[StepOutput]) -> None:
        """Tell each router the tokens of one step in one event. A local request's first token is its Prefilled."""
        by_router: dict[Emit, list[SequenceTokens]] = {}
        for output in outputs:
            attempt = self._attempts.get(output.request.request_id)
            if attempt is None:
                continue
            key, finish = attempt.ticket.key, output.finish_reason
            if attempt.ticket.local and len(output.request.output_token_ids) == 1:
                told, num_cached = tuple(output.request.prompt_logprobs), output.request.num_cached_tokens or 0
                attempt.emit(Prefilled(key, output.token_ids[0], finish, None, output.logprobs, told, num_cached))
            else:
                tokens = SequenceTokens(key, output.token_ids, finish, output.logprobs)
                by_router.setdefault(attempt.emit, []).append(tokens)
            if finish is not None:
                self.drop(key)
        for emit, sequences in by_router.items():
            emit(StepTokens(tuple(sequences)))

    def fail(self, key: AttemptKey, reason: str, message: str) -> None:
        """Give the attempt up and say so; nothing of it is left here."""
        if attempt := self._attempts.get(engine_id(key)):
            self.drop(key)
            attempt.emit(AttemptFailed(key, reason, message))

    def release(self, key: AttemptKey) -> None:
        attempt = self._attempts.get(engine_id(key))
        self.drop(key)
        if attempt is not None:
            attempt.emit(Released(key))

    def drop(self, key: AttemptKey) -> None:
        """Free the blocks; late segments find no ticket. Idempotent, legal in every state."""
        self._receiver.release(key)
        self._attempts.pop(engine_id(key), None)
        self._scheduler.release(engine_id(key))


def _attempt(command: Reserve | Prefill, token_ids: list[int], emit: Emit) -> _Attempt:
    """What came rounded is never found by a request whose K and V must be exact: it goes under a salt of its own."""
    ticket, work = command.ticket, command.work
    exact = ticket.local or ticket.kv_wire_dtype == "auto"
    salt = work.cache_salt if exact else f"{ticket.kv_wire_dtype}\0{work.cache_salt}"
    name = engine_id(ticket.key)
    request = Request(name, token_ids, work.sampling, work.num_prompt_tokens, cache_salt=salt)
    return _Attempt(ticket, request, emit)
