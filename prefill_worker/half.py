"""The sending half of a worker: prompts are computed, K and V pushed layer by layer, the first token committed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from core.errors import TransferError
from core.messages import AttemptFailed, Event, Prefill, Prefilled, Released
from core.request import Request
from core.ticket import AttemptKey, CommitRecord, Ticket, engine_id
from engine.plan import Plan, StepOutput
from engine.scheduler import Scheduler
from kv_transfer.sender import KVSender


@dataclass(frozen=True, slots=True)
class _Attempt:
    ticket: Ticket
    request: Request
    emit: Callable[[Event], None]


class PrefillHalf:
    """Attempts whose prompt is computed here and decoded elsewhere.

    Owns their blocks from `start` to `drop`: the scheduler holds them after the first token until the router releases
    the attempt, cancels it, or its lease ends. Called by the engine thread alone, but for `KVSender`'s own threads.
    """

    def __init__(self, scheduler: Scheduler, sender: KVSender) -> None:
        self._scheduler, self._sender = scheduler, sender
        self._attempts: dict[str, _Attempt] = {}  # by the scheduler's request id

    def __contains__(self, key: AttemptKey) -> bool:
        return engine_id(key) in self._attempts

    def keys(self) -> list[AttemptKey]:
        return [attempt.ticket.key for attempt in self._attempts.values()]

    def start(self, command: Prefill, token_ids: list[int], emit: Callable[[Event], None]) -> None:
        """Queue the prompt. Raises TransferError where the pair's channel is not up, or what is copied not cached."""
        ticket, work = command.ticket, command.work
        name = engine_id(ticket.key)
        request = Request(name, token_ids, work.sampling, work.num_prompt_tokens, cache_salt=work.cache_salt)
        if command.copy and (num_found := self._scheduler.num_found(request)) < len(token_ids) - 1:
            raise TransferError("not_cached", f"of {len(token_ids) - 1} tokens {num_found} are in the cache")
        self._sender.begin(ticket, token_ids[: command.num_skipped_tokens])
        self._attempts[request.request_id] = _Attempt(ticket, request, emit)
        earlier = [engine_id((ticket.transfer_id, attempt)) for attempt in range(1, ticket.attempt)]
        if not (command.handover and any(self._scheduler.succeed(name, request) for name in earlier)):
            self._scheduler.add(request, prefill_only=True)

    def push(self, plan: Plan, layer: int) -> None:
        """K and V of `layer` stand in the cache for the whole plan: send them on while the next layer is computed.

        What a prompt's first entry found in the cache goes with it.
        """
        for entry in plan.entries:
            if attempt := self._attempts.get(entry.request_id):
                start = 0 if entry.start == attempt.request.num_cached_tokens else entry.start
                self._sender.push(attempt.ticket.key, layer, start, entry.end, entry.block_ids)

    def publish(self, output: StepOutput) -> bool:
        """Commit a prompt whose first token is drawn; False where the output is not of this half."""
        attempt = self._attempts.get(output.request.request_id)
        if attempt is None:
            return False
        key = attempt.ticket.key
        if output.finish_reason is not None:
            attempt.emit(_prefilled(key, output, None))
            self.drop(key)
            return True
        try:
            record = self._sender.commit(key, attempt.request.prompt_token_ids)
        except TransferError as error:
            self.fail(key, error.reason, str(error))
            return True
        attempt.emit(_prefilled(key, output, record))
        return True

    def fail(self, key: AttemptKey, reason: str, message: str) -> None:
        """Give the attempt up and say so; nothing of it is left here."""
        if attempt := self._attempts.get(engine_id(key)):
            self.drop(key)
            attempt.emit(AttemptFailed(key, reason, message))

    def release(self, key: AttemptKey) -> None:
        """The router's Release: the decode side has everything."""
        attempt, stats = self._attempts.get(engine_id(key)), self._sender.release(key)
        self.drop(key)
        if attempt is not None:
            attempt.emit(Released(key, stats))

    def drop(self, key: AttemptKey) -> None:
        """Stop sending and free the blocks. Idempotent, legal in every state."""
        self._attempts.pop(engine_id(key), None)
        self._scheduler.release(engine_id(key))
        self._sender.cancel(key)  # first, so that `release` does not wait for what is under way
        self._sender.release(key)


def _prefilled(key: AttemptKey, output: StepOutput, record: CommitRecord | None) -> Prefilled:
    told, num_cached = tuple(output.request.prompt_logprobs), output.request.num_cached_tokens or 0
    return Prefilled(key, output.token_ids[0], output.finish_reason, record, output.logprobs, told, num_cached)
