"""Workers' messages from the wire."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from core.errors import ErrorCode, PenstockError
from core.kv_layout import KVLayout
from core.logprobs import TokenLogprobs
from core.messages import (
    Accepted,
    AttemptFailed,
    CacheChanged,
    CacheFlushed,
    Drained,
    Event,
    Load,
    PairDown,
    PairUp,
    Prefilled,
    Refused,
    Released,
    Reserved,
    SequenceTokens,
    StepTokens,
    TransferStats,
    WorkerHello,
    WorkerRole,
)
from core.request import FinishReason
from core.ticket import CommitRecord, Segment, SegmentRecord
from penstock.v1 import inference_pb2
from penstock.v1 import worker_pb2 as pb


class WireError(PenstockError):
    """The other side sent what this version can't read."""

    code = ErrorCode.INVALID_ARGUMENT


@dataclass(frozen=True, slots=True)
class Challenge:
    """A worker's answer to a router's nonce, where the cluster has a secret."""

    nonce: bytes
    proof: bytes
    incarnation: str


@dataclass(frozen=True, slots=True)
class WorkerMessage:
    """`load` is the worker's state after `events`."""

    hello: WorkerHello | None
    events: tuple[Event, ...]
    load: Load | None
    challenge: Challenge | None = None


def message_from_wire(message: pb.WorkerMessage) -> WorkerMessage:
    """`WireError` on an event, role or finish reason that is not known here."""
    return WorkerMessage(
        hello=_hello(message.hello) if message.HasField("hello") else None,
        events=tuple(_event(event) for event in message.events),
        load=_load(message.load) if message.HasField("load") else None,
        challenge=Challenge(message.challenge.nonce, message.challenge.proof, message.challenge.incarnation)
        if message.HasField("challenge")
        else None,
    )


def role_from_wire(role: int) -> WorkerRole:
    if role not in _ROLES:
        raise WireError(f"role: got {role}, must be prefill, decode or mixed")
    return _ROLES[role]


def _event(event: pb.Event) -> Event:
    kind = event.WhichOneof("event")
    if kind is None:
        raise WireError("the worker sent an event of a kind that this router does not know")
    return _EVENTS[kind](getattr(event, kind))


def _finish(finish: int) -> FinishReason | None:
    if finish not in _FINISHES:
        raise WireError(f"finish: got {finish}, must be stop or length")
    return _FINISHES[finish]


def _hello(hello: pb.WorkerHello) -> WorkerHello:
    return WorkerHello(
        worker_id=hello.worker_id,
        incarnation=hello.incarnation,
        role=role_from_wire(hello.role),
        layout=_layout(hello.layout),
        credits=hello.credits,
        num_blocks=hello.num_blocks,
        max_model_len=hello.max_model_len,
        kv_address=hello.kv_address,
        device=hello.device,
        max_pairs=hello.max_pairs,
        runs_alone=hello.runs_alone,
        wire_version=hello.wire_version,
    )


def _layout(layout: pb.KVLayout) -> KVLayout:
    return KVLayout(
        model=layout.model,
        fingerprint=layout.fingerprint,
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_size=layout.head_size,
        block_size=layout.block_size,
        dtype=layout.dtype,
        kind=layout.kind,
        weights=layout.weights,
    )


def _load(load: pb.Load) -> Load:
    return Load(
        num_running=load.num_running,
        num_waiting=load.num_waiting,
        num_held=load.num_held,
        num_free_blocks=load.num_free_blocks,
        num_preemptions=load.num_preemptions,
        num_waiting_tokens=load.num_waiting_tokens,
        draining=load.draining,
        num_prefix_queries=load.num_prefix_queries,
        num_prefix_hits=load.num_prefix_hits,
        mask_wait_s=load.mask_wait_s,
        num_drafts=load.num_drafts,
        num_draft_tokens=load.num_draft_tokens,
        num_accepted_tokens=load.num_accepted_tokens,
        num_parked=load.num_parked,
        parked_bytes=load.parked_bytes,
        num_parks=load.num_parks,
        num_recomputes=load.num_recomputes,
    )


def _prefilled(event: pb.Prefilled) -> Prefilled:
    return Prefilled(
        key=(event.transfer_id, event.attempt),
        first_token_id=event.first_token_id,
        finish=_finish(event.finish),
        record=_record(event.record) if event.HasField("record") else None,
        logprobs=_logprobs(event.logprobs),
        prompt_logprobs=_logprobs(event.prompt_logprobs),
        num_cached_tokens=event.num_cached_tokens,
    )


def _logprobs(told: Iterable[inference_pb2.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    return tuple(
        TokenLogprobs(t.token_id, t.logprob, t.rank, tuple(zip(t.top_token_ids, t.top_logprobs, strict=True)))
        for t in told
    )


def _record(record: pb.CommitRecord) -> CommitRecord:
    return CommitRecord(
        segments=tuple(_segment(segment) for segment in record.segments),
        num_tokens=record.num_tokens,
        num_skipped_tokens=record.num_skipped_tokens,
        skipped_prefix_hash=record.skipped_prefix_hash,
    )


def _segment(record: pb.SegmentRecord) -> SegmentRecord:
    segment = Segment(
        layer=record.layer,
        kv_head_start=record.kv_head_start,
        kv_head_end=record.kv_head_end,
        token_start=record.token_start,
        token_end=record.token_end,
        sender_rank=record.sender_rank,
        receiver_rank=record.receiver_rank,
    )
    return SegmentRecord(segment, record.num_bytes, record.checksum)


def _released(event: pb.Released) -> Released:
    transfer = None
    if event.HasField("transfer"):
        transfer = TransferStats(event.transfer.num_bytes, event.transfer.transfer_s, event.transfer.exposed_s)
    return Released((event.transfer_id, event.attempt), transfer)


def _tokens(event: pb.StepTokens) -> StepTokens:
    return StepTokens(
        tuple(
            SequenceTokens(
                (sequence.transfer_id, sequence.attempt),
                tuple(sequence.token_ids),
                _finish(sequence.finish),
                _logprobs(sequence.logprobs),
            )
            for sequence in event.sequences
        )
    )


_EVENTS: dict[str, Callable[[Any], Event]] = {
    "pair_up": lambda e: PairUp(e.prefill_incarnation, e.decode_incarnation, e.epoch, e.transport),
    "pair_down": lambda e: PairDown(e.prefill_incarnation, e.decode_incarnation, e.epoch, e.reason, e.permanent),
    "reserved": lambda e: Reserved((e.transfer_id, e.attempt), e.num_skipped_tokens),
    "refused": lambda e: Refused((e.transfer_id, e.attempt), e.reason),
    "prefilled": _prefilled,
    "accepted": lambda e: Accepted((e.transfer_id, e.attempt), e.commit_wait_s),
    "released": _released,
    "tokens": _tokens,
    "failed": lambda e: AttemptFailed((e.transfer_id, e.attempt), e.reason, e.message),
    "cache_changed": lambda e: CacheChanged(tuple(e.stored), tuple(e.removed), e.cleared),
    "cache_flushed": lambda e: CacheFlushed(e.num_blocks),
    "drained": lambda _: Drained(),
}

_ROLES: dict[int, WorkerRole] = {
    inference_pb2.WORKER_ROLE_PREFILL: WorkerRole.PREFILL,
    inference_pb2.WORKER_ROLE_DECODE: WorkerRole.DECODE,
    inference_pb2.WORKER_ROLE_MIXED: WorkerRole.MIXED,
}

_FINISHES: dict[int, FinishReason | None] = {
    pb.ENGINE_FINISH_UNSPECIFIED: None,
    pb.ENGINE_FINISH_STOP: FinishReason.STOP,
    pb.ENGINE_FINISH_LENGTH: FinishReason.LENGTH,
}
