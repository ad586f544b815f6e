"""What an attempt is made of, and what becomes of it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

from core.logprobs import TokenLogprobs
from core.messages import TransferStats, Work
from core.request import FinishReason
from core.ticket import Ticket
from router.ledger import Entry, Failure
from router.policies.model import Route


@dataclass(frozen=True, slots=True)
class Refusal:
    """A worker had no room."""

    incarnation: str
    reason: str


@dataclass(frozen=True, slots=True)
class TooSlow:
    """The client does not read what was streamed to it."""


@dataclass(frozen=True, slots=True)
class Told:
    """Tokens that a worker drew, and what it tells of them and of the prompt."""

    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()


Outcome = FinishReason | Refusal | Failure | TooSlow


def ticket_of(entry: Entry, route: Route) -> Ticket:
    """Of the entry's latest attempt."""
    return Ticket(
        request_id=entry.request.request_id,
        attempt=entry.num_attempts,
        transfer_id=entry.transfer_id,
        prefill_incarnation=route.prefill,
        decode_incarnation=route.decode,
        pair_epoch=route.epoch,
        kv_wire_dtype=entry.request.kv_wire_dtype,
        traceparent=entry.request.traceparent,
    )


def work_of(entry: Entry) -> Work:
    """Prompt and all that was streamed of the answer."""
    request = entry.request
    sampling = request.sampling
    if request.output_token_ids:
        sampling = replace(sampling, prompt_logprobs=None)  # told with the first token
    return Work(
        tuple(request.token_ids(0, request.num_tokens)),
        request.num_prompt_tokens,
        sampling,
        cache_salt=request.cache_salt,
        timeout_s=remaining_s(entry.deadline_timer),
    )


def remaining_s(timer: asyncio.TimerHandle | None) -> float | None:
    """Until `timer` goes off."""
    return None if timer is None else max(0.001, timer.when() - asyncio.get_running_loop().time())


def add_transfer(entry: Entry, transfer: TransferStats) -> None:
    """Transfers of all attempts add up: each was carried."""
    stats = entry.stats
    stats.kv_bytes = (stats.kv_bytes or 0) + transfer.num_bytes
    stats.transfer_s = (stats.transfer_s or 0.0) + transfer.transfer_s
    stats.transfer_exposed_s = (stats.transfer_exposed_s or 0.0) + transfer.exposed_s
