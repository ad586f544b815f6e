"""Commands to the wire."""

from __future__ import annotations

from core.kv_layout import KVLayout
from core.messages import (
    Accept,
    Cancel,
    Command,
    Connect,
    Disconnect,
    Drain,
    FlushCache,
    Heartbeat,
    Prefill,
    PromptPart,
    Release,
    Reserve,
    Work,
)
from core.sampling import SamplingParams
from core.secret import Secret
from core.ticket import CommitRecord, SegmentRecord, Ticket
from penstock.v1 import inference_pb2
from penstock.v1 import worker_pb2 as pb


def command_to_wire(command: Command, signer: Secret | None = None) -> pb.Command:
    """Its ticket is signed, where it has one and there is a signer."""
    wire = _to_wire(command)
    ticket: Ticket | None = getattr(command, "ticket", None)
    if signer is not None and ticket is not None:
        inner = getattr(wire, str(wire.WhichOneof("command")))
        inner.ticket.signature = signer.prove("ticket", *ticket.signed_fields)
    return wire


def _to_wire(command: Command) -> pb.Command:
    match command:
        case Connect():
            return pb.Command(connect=_connect(command))
        case Disconnect(prefill, decode, epoch):
            return pb.Command(
                disconnect=pb.Disconnect(prefill_incarnation=prefill, decode_incarnation=decode, epoch=epoch)
            )
        case PromptPart(ticket, offset, token_ids):
            return pb.Command(prompt_part=pb.PromptPart(ticket=_ticket(ticket), offset=offset, token_ids=token_ids))
        case Reserve(ticket, work, copy):
            return pb.Command(reserve=pb.Reserve(ticket=_ticket(ticket), work=_work(work), copy=copy))
        case Prefill(ticket, work, num_skipped, handover, copy):
            wire = pb.Prefill(
                ticket=_ticket(ticket),
                work=_work(work),
                num_skipped_tokens=num_skipped,
                handover=handover,
                copy=copy,
            )
            return pb.Command(prefill=wire)
        case Accept():
            return pb.Command(accept=_accept(command))
        case Release(ticket):
            return pb.Command(release=pb.Release(ticket=_ticket(ticket)))
        case Cancel(ticket, reason):
            return pb.Command(cancel=pb.CancelAttempt(ticket=_ticket(ticket), reason=reason))
        case Heartbeat(live):
            return pb.Command(heartbeat=pb.Heartbeat(live_transfer_ids=live))
        case Drain(deadline_s):
            return pb.Command(drain=pb.Drain(deadline_s=deadline_s))
        case FlushCache():
            return pb.Command(flush_cache=pb.FlushCache())


def layout_to_wire(layout: KVLayout) -> pb.KVLayout:
    return pb.KVLayout(
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


def _connect(command: Connect) -> pb.Connect:
    return pb.Connect(
        prefill_incarnation=command.prefill_incarnation,
        decode_incarnation=command.decode_incarnation,
        epoch=command.epoch,
        store_address=command.store_address,
        peer_layout=layout_to_wire(command.peer_layout),
        secret=command.secret,
    )


def _accept(command: Accept) -> pb.Accept:
    return pb.Accept(
        ticket=_ticket(command.ticket),
        record=_record(command.record),
        first_token_id=command.first_token_id,
        deadline_s=command.deadline_s,
    )


def _ticket(ticket: Ticket) -> pb.Ticket:
    return pb.Ticket(
        request_id=ticket.request_id,
        attempt=ticket.attempt,
        transfer_id=ticket.transfer_id,
        prefill_incarnation=ticket.prefill_incarnation,
        decode_incarnation=ticket.decode_incarnation,
        pair_epoch=ticket.pair_epoch,
        kv_wire_dtype=ticket.kv_wire_dtype,
        traceparent=ticket.traceparent,
    )


def _work(work: Work) -> pb.Work:
    return pb.Work(
        prompt_offset=work.prompt_offset,
        token_ids=work.token_ids,
        num_prompt_tokens=work.num_prompt_tokens,
        sampling=_sampling(work.sampling),
        cache_salt=work.cache_salt,
        timeout_s=work.timeout_s,
    )


def _sampling(sampling: SamplingParams) -> pb.EngineSampling:
    return pb.EngineSampling(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed,
        max_tokens=sampling.max_tokens,
        min_tokens=sampling.min_tokens,
        stop_token_ids=sampling.stop_token_ids,
        min_p=sampling.min_p,
        repetition_penalty=sampling.repetition_penalty,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        logit_bias=[inference_pb2.TokenBias(token_id=token_id, bias=bias) for token_id, bias in sampling.logit_bias],
        bad_words=[inference_pb2.TokenIds(ids=word) for word in sampling.bad_words],
        allowed_token_ids=sampling.allowed_token_ids,
        grammar=sampling.grammar,
        logprobs=sampling.logprobs,
        prompt_logprobs=sampling.prompt_logprobs,
    )


def _record(record: CommitRecord) -> pb.CommitRecord:
    return pb.CommitRecord(
        segments=[_segment(segment) for segment in record.segments],
        num_tokens=record.num_tokens,
        num_skipped_tokens=record.num_skipped_tokens,
        skipped_prefix_hash=record.skipped_prefix_hash,
    )


def _segment(record: SegmentRecord) -> pb.SegmentRecord:
    segment = record.segment
    return pb.SegmentRecord(
        layer=segment.layer,
        kv_head_start=segment.kv_head_start,
        kv_head_end=segment.kv_head_end,
        token_start=segment.token_start,
        token_end=segment.token_end,
        sender_rank=segment.sender_rank,
        receiver_rank=segment.receiver_rank,
        num_bytes=record.num_bytes,
        checksum=record.checksum,
    )
