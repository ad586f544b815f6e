"""The worker's end of worker.proto: commands from the wire, events onto it."""

from __future__ import annotations

from collections.abc import Sequence

from core.errors import InvalidRequestError, UnauthenticatedError
from core.kv_layout import KVLayout, wire_dtype
from core.logprobs import TokenLogprobs
from core.messages import (
    Accept,
    Accepted,
    AttemptFailed,
    CacheChanged,
    CacheFlushed,
    Cancel,
    Command,
    Connect,
    Disconnect,
    Drain,
    Drained,
    Event,
    FlushCache,
    Heartbeat,
    Load,
    PairDown,
    PairUp,
    Prefill,
    Prefilled,
    PromptPart,
    Refused,
    Release,
    Released,
    Reserve,
    Reserved,
    RouterHello,
    SequenceTokens,
    StepTokens,
    Work,
    WorkerHello,
    WorkerRole,
)
from core.request import FinishReason
from core.sampling import SamplingParams
from core.secret import Secret
from core.ticket import AttemptKey, CommitRecord, Segment, SegmentRecord, Ticket
from penstock.v1 import inference_pb2, worker_pb2
from router.handshake import Handshake

ROLES = {
    WorkerRole.PREFILL: inference_pb2.WORKER_ROLE_PREFILL,
    WorkerRole.DECODE: inference_pb2.WORKER_ROLE_DECODE,
    WorkerRole.MIXED: inference_pb2.WORKER_ROLE_MIXED,
}
_FINISH = {
    None: worker_pb2.ENGINE_FINISH_UNSPECIFIED,
    FinishReason.STOP: worker_pb2.ENGINE_FINISH_STOP,
    FinishReason.LENGTH: worker_pb2.ENGINE_FINISH_LENGTH,
}


# ---- from the router


def router_hello(wire: worker_pb2.RouterHello) -> RouterHello:
    return RouterHello(wire.router_id, wire.incarnation, wire.wire_version, wire.nonce)


def command(wire: worker_pb2.Command, verifier: Secret | None = None) -> Command:
    """Raises InvalidRequestError where the command is unknown or its values can't be, UnauthenticatedError where its
    ticket is not signed by `verifier`, if there is one."""
    command = _command(wire)
    ticket: Ticket | None = getattr(command, "ticket", None)
    if verifier is not None and ticket is not None:
        inner = getattr(wire, str(wire.WhichOneof("command")))
        if not verifier.accepts(inner.ticket.signature, "ticket", *ticket.signed_fields):
            raise UnauthenticatedError(f"the ticket of request {ticket.request_id} is not signed by this router")
    return command


def _command(wire: worker_pb2.Command) -> Command:
    match wire.WhichOneof("command"):
        case "connect":
            c = wire.connect
            return Connect(
                c.prefill_incarnation, c.decode_incarnation, c.epoch, c.store_address, _layout(c.peer_layout), c.secret
            )
        case "disconnect":
            d = wire.disconnect
            return Disconnect(d.prefill_incarnation, d.decode_incarnation, d.epoch)
        case "prompt_part":
            p = wire.prompt_part
            return PromptPart(_ticket(p.ticket), p.offset, tuple(p.token_ids))
        case "reserve":
            return Reserve(_ticket(wire.reserve.ticket), _work(wire.reserve.work), wire.reserve.copy)
        case "prefill":
            prefill = wire.prefill
            ticket, work = _ticket(prefill.ticket), _work(prefill.work)
            return Prefill(ticket, work, prefill.num_skipped_tokens, prefill.handover, prefill.copy)
        case "accept":
            a = wire.accept
            return Accept(_ticket(a.ticket), _record(a.record), a.first_token_id, a.deadline_s)
        case "release":
            return Release(_ticket(wire.release.ticket))
        case "cancel":
            return Cancel(_ticket(wire.cancel.ticket), wire.cancel.reason)
        case "heartbeat":
            return Heartbeat(tuple(wire.heartbeat.live_transfer_ids))
        case "drain":
            return Drain(wire.drain.deadline_s)
        case "flush_cache":
            return FlushCache()
        case _:
            raise InvalidRequestError("command", wire.WhichOneof("command"), "is not one that this worker knows")


def _ticket(wire: worker_pb2.Ticket) -> Ticket:
    return Ticket(
        wire.request_id,
        wire.attempt,
        wire.transfer_id,
        wire.prefill_incarnation,
        wire.decode_incarnation,
        wire.pair_epoch,
        wire_dtype(wire.kv_wire_dtype or "auto"),
        wire.traceparent,
    )


def _layout(wire: worker_pb2.KVLayout) -> KVLayout:
    return KVLayout(
        wire.model,
        wire.fingerprint,
        wire.num_layers,
        wire.num_kv_heads,
        wire.head_size,
        wire.block_size,
        wire.dtype,
        wire.kind,
        wire.weights,
    )


def _work(wire: worker_pb2.Work) -> Work:
    s = wire.sampling
    sampling = SamplingParams(
        max_tokens=s.max_tokens,
        temperature=s.temperature,
        top_p=s.top_p,
        top_k=s.top_k,
        seed=s.seed,
        min_tokens=s.min_tokens,
        stop_token_ids=tuple(s.stop_token_ids),
        min_p=s.min_p,
        repetition_penalty=s.repetition_penalty,
        frequency_penalty=s.frequency_penalty,
        presence_penalty=s.presence_penalty,
        logit_bias=tuple((bias.token_id, bias.bias) for bias in s.logit_bias),
        bad_words=tuple(tuple(word.ids) for word in s.bad_words),
        allowed_token_ids=tuple(s.allowed_token_ids),
        grammar=s.grammar,
        logprobs=s.logprobs if s.HasField("logprobs") else None,
        prompt_logprobs=s.prompt_logprobs if s.HasField("prompt_logprobs") else None,
    )
    timeout_s = wire.timeout_s if wire.HasField("timeout_s") else None
    offset, salt = wire.prompt_offset, wire.cache_salt
    return Work(tuple(wire.token_ids), wire.num_prompt_tokens, sampling, offset, salt, timeout_s)


def _record(wire: worker_pb2.CommitRecord) -> CommitRecord:
    segments = tuple(
        SegmentRecord(
            Segment(
                s.layer,
                s.kv_head_start,
                s.kv_head_end,
                s.token_start,
                s.token_end,
                s.sender_rank,
                s.receiver_rank,
            ),
            s.num_bytes,
            s.checksum,
        )
        for s in wire.segments
    )
    return CommitRecord(segments, wire.num_tokens, wire.num_skipped_tokens, wire.skipped_prefix_hash)


# ---- to the router


def challenge_message(handshake: Handshake) -> worker_pb2.WorkerMessage:
    return worker_pb2.WorkerMessage(
        challenge=worker_pb2.Challenge(
            nonce=handshake.worker_nonce, proof=handshake.worker_proof(), incarnation=handshake.worker_incarnation
        )
    )


def worker_hello_message(hello: WorkerHello) -> worker_pb2.WorkerMessage:
    layout = hello.layout
    return worker_pb2.WorkerMessage(
        hello=worker_pb2.WorkerHello(
            wire_version=hello.wire_version,
            worker_id=hello.worker_id,
            incarnation=hello.incarnation,
            role=ROLES[hello.role],
            layout=worker_pb2.KVLayout(
                model=layout.model,
                fingerprint=layout.fingerprint,
                num_layers=layout.num_layers,
                num_kv_heads=layout.num_kv_heads,
                head_size=layout.head_size,
                block_size=layout.block_size,
                dtype=layout.dtype,
                kind=layout.kind,
                weights=layout.weights,
            ),
            credits=hello.credits,
            num_blocks=hello.num_blocks,
            max_model_len=hello.max_model_len,
            kv_address=hello.kv_address,
            device=hello.device,
            max_pairs=hello.max_pairs,
            runs_alone=hello.runs_alone,
        )
    )


def worker_message(events: Sequence[Event], load: Load) -> worker_pb2.WorkerMessage:
    return worker_pb2.WorkerMessage(
        events=[_event(event) for event in events],
        load=worker_pb2.Load(
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
        ),
    )


def _event(event: Event) -> worker_pb2.Event:
    match event:
        case PairUp(prefill, decode, epoch, transport):
            up = worker_pb2.PairUp(
                prefill_incarnation=prefill, decode_incarnation=decode, epoch=epoch, transport=transport
            )
            return worker_pb2.Event(pair_up=up)
        case PairDown(prefill, decode, epoch, reason, permanent):
            down = worker_pb2.PairDown(
                prefill_incarnation=prefill, decode_incarnation=decode, epoch=epoch, reason=reason, permanent=permanent
            )
            return worker_pb2.Event(pair_down=down)
        case Reserved((transfer_id, attempt), num_skipped_tokens):
            reserved = worker_pb2.Reserved(
                transfer_id=transfer_id, attempt=attempt, num_skipped_tokens=num_skipped_tokens
            )
            return worker_pb2.Event(reserved=reserved)
        case Refused((transfer_id, attempt), reason):
            return worker_pb2.Event(refused=worker_pb2.Refused(transfer_id=transfer_id, attempt=attempt, reason=reason))
        case Prefilled():
            return worker_pb2.Event(prefilled=_prefilled(event))
        case Accepted((transfer_id, attempt), wait_s):
            return worker_pb2.Event(
                accepted=worker_pb2.Accepted(transfer_id=transfer_id, attempt=attempt, commit_wait_s=wait_s)
            )
        case Released(key, _):
            return worker_pb2.Event(released=_released(event, key))
        case StepTokens(sequences):
            return worker_pb2.Event(tokens=worker_pb2.StepTokens(sequences=map(_sequence, sequences)))
        case AttemptFailed((transfer_id, attempt), reason, message):
            failed = worker_pb2.AttemptFailed(transfer_id=transfer_id, attempt=attempt, reason=reason, message=message)
            return worker_pb2.Event(failed=failed)
        case CacheChanged(stored, removed, cleared):
            changed = worker_pb2.CacheChanged(stored=stored, removed=removed, cleared=cleared)
            return worker_pb2.Event(cache_changed=changed)
        case CacheFlushed(num_blocks):
            return worker_pb2.Event(cache_flushed=worker_pb2.CacheFlushed(num_blocks=num_blocks))
        case Drained():
            return worker_pb2.Event(drained=worker_pb2.Drained())


def _sequence(tokens: SequenceTokens) -> worker_pb2.SequenceTokens:
    transfer_id, attempt = tokens.key
    return worker_pb2.SequenceTokens(
        transfer_id=transfer_id,
        attempt=attempt,
        token_ids=tokens.token_ids,
        finish=_FINISH[tokens.finish],
        logprobs=map(_logprobs, tokens.logprobs),
    )


def _prefilled(event: Prefilled) -> worker_pb2.Prefilled:
    transfer_id, attempt = event.key
    return worker_pb2.Prefilled(
        transfer_id=transfer_id,
        attempt=attempt,
        first_token_id=event.first_token_id,
        finish=_FINISH[event.finish],
        record=None if event.record is None else _record_to_wire(event.record),
        logprobs=map(_logprobs, event.logprobs),
        prompt_logprobs=map(_logprobs, event.prompt_logprobs),
        num_cached_tokens=event.num_cached_tokens,
    )


def _logprobs(told: TokenLogprobs) -> inference_pb2.TokenLogprobs:
    return inference_pb2.TokenLogprobs(
        token_id=told.token_id,
        logprob=told.logprob,
        rank=told.rank,
        top_token_ids=[token_id for token_id, _ in told.top],
        top_logprobs=[logprob for _, logprob in told.top],
    )


def _record_to_wire(record: CommitRecord) -> worker_pb2.CommitRecord:
    return worker_pb2.CommitRecord(
        segments=[
            worker_pb2.SegmentRecord(
                layer=r.segment.layer,
                kv_head_start=r.segment.kv_head_start,
                kv_head_end=r.segment.kv_head_end,
                token_start=r.segment.token_start,
                token_end=r.segment.token_end,
                sender_rank=r.segment.sender_rank,
                receiver_rank=r.segment.receiver_rank,
                num_bytes=r.num_bytes,
                checksum=r.checksum,
            )
            for r in record.segments
        ],
        num_tokens=record.num_tokens,
        num_skipped_tokens=record.num_skipped_tokens,
        skipped_prefix_hash=record.skipped_prefix_hash,
    )


def _released(event: Released, key: AttemptKey) -> worker_pb2.Released:
    transfer_id, attempt = key
    stats = event.transfer
    if stats is None:
        return worker_pb2.Released(transfer_id=transfer_id, attempt=attempt)
    transfer = worker_pb2.TransferStats(
        num_bytes=stats.num_bytes, transfer_s=stats.transfer_s, exposed_s=stats.exposed_s
    )
    return worker_pb2.Released(transfer_id=transfer_id, attempt=attempt, transfer=transfer)
