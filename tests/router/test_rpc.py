"""Typed messages and the wire: nothing is lost, and what can't be read is refused."""

from __future__ import annotations

import pytest

from core.kv_layout import KVLayout
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
    SequenceTokens,
    StepTokens,
    TransferStats,
    Work,
    WorkerRole,
)
from core.request import FinishReason
from core.sampling import SamplingParams
from core.ticket import CommitRecord, Segment, SegmentRecord, Ticket
from penstock.v1 import worker_pb2 as pb
from router.rpc_commands import command_to_wire
from router.rpc_events import WireError, message_from_wire

TICKET = Ticket("r", 2, "t", "p", "d", 7, "int8")
WIRE_TICKET = pb.Ticket(
    request_id="r",
    attempt=2,
    transfer_id="t",
    prefill_incarnation="p",
    decode_incarnation="d",
    pair_epoch=7,
    kv_wire_dtype="int8",
)
SAMPLING = SamplingParams(
    max_tokens=9, temperature=0.5, top_p=0.25, top_k=3, seed=2**64 - 1, min_tokens=2, stop_token_ids=(4, 5)
)
WORK = Work((1, 2, 3), 2, SAMPLING, prompt_offset=8)
WIRE_WORK = pb.Work(
    prompt_offset=8,
    token_ids=[1, 2, 3],
    num_prompt_tokens=2,
    sampling=pb.EngineSampling(
        temperature=0.5,
        top_p=0.25,
        top_k=3,
        seed=2**64 - 1,
        max_tokens=9,
        min_tokens=2,
        stop_token_ids=[4, 5],
        repetition_penalty=1,
    ),
)
RECORD = CommitRecord((SegmentRecord(Segment(1, 2, 3, 4, 5, 6, 7), 8, 2**64 - 1),), 10, 11, b"hash")
WIRE_RECORD = pb.CommitRecord(
    segments=[
        pb.SegmentRecord(
            layer=1,
            kv_head_start=2,
            kv_head_end=3,
            token_start=4,
            token_end=5,
            sender_rank=6,
            receiver_rank=7,
            num_bytes=8,
            checksum=2**64 - 1,
        )
    ],
    num_tokens=10,
    num_skipped_tokens=11,
    skipped_prefix_hash=b"hash",
)
LAYOUT = KVLayout("m", "f", 1, 2, 3, 4, "float16", "latent", "int8")
WIRE_LAYOUT = pb.KVLayout(
    model="m",
    fingerprint="f",
    num_layers=1,
    num_kv_heads=2,
    head_size=3,
    block_size=4,
    dtype="float16",
    kind="latent",
    weights="int8",
)

COMMANDS: list[tuple[Command, pb.Command]] = [
    (
        Connect("p", "d", 7, "host:1", LAYOUT),
        pb.Command(
            connect=pb.Connect(
                prefill_incarnation="p",
                decode_incarnation="d",
                epoch=7,
                store_address="host:1",
                peer_layout=WIRE_LAYOUT,
            )
        ),
    ),
    (
        Disconnect("p", "d", 7),
        pb.Command(disconnect=pb.Disconnect(prefill_incarnation="p", decode_incarnation="d", epoch=7)),
    ),
    (
        PromptPart(TICKET, 4, (5, 6)),
        pb.Command(prompt_part=pb.PromptPart(ticket=WIRE_TICKET, offset=4, token_ids=[5, 6])),
    ),
    (Reserve(TICKET, WORK), pb.Command(reserve=pb.Reserve(ticket=WIRE_TICKET, work=WIRE_WORK))),
    (
        Prefill(TICKET, WORK, 5),
        pb.Command(prefill=pb.Prefill(ticket=WIRE_TICKET, work=WIRE_WORK, num_skipped_tokens=5)),
    ),
    (
        Accept(TICKET, RECORD, 3, 1.5),
        pb.Command(accept=pb.Accept(ticket=WIRE_TICKET, record=WIRE_RECORD, first_token_id=3, deadline_s=1.5)),
    ),
    (Release(TICKET), pb.Command(release=pb.Release(ticket=WIRE_TICKET))),
    (Cancel(TICKET, "why"), pb.Command(cancel=pb.CancelAttempt(ticket=WIRE_TICKET, reason="why"))),
    (Heartbeat(("a", "b")), pb.Command(heartbeat=pb.Heartbeat(live_transfer_ids=["a", "b"]))),
    (Drain(2.5), pb.Command(drain=pb.Drain(deadline_s=2.5))),
    (FlushCache(), pb.Command(flush_cache=pb.FlushCache())),
]

KEY = ("t", 2)
EVENTS: list[tuple[pb.Event, Event]] = [
    (
        pb.Event(pair_up=pb.PairUp(prefill_incarnation="p", decode_incarnation="d", epoch=7, transport="shm")),
        PairUp("p", "d", 7, "shm"),
    ),
    (
        pb.Event(
            pair_down=pb.PairDown(
                prefill_incarnation="p", decode_incarnation="d", epoch=7, reason="why", permanent=True
            )
        ),
        PairDown("p", "d", 7, "why", True),
    ),
    (
        pb.Event(reserved=pb.Reserved(transfer_id="t", attempt=2, num_skipped_tokens=3)),
        Reserved(KEY, 3),
    ),
    (pb.Event(refused=pb.Refused(transfer_id="t", attempt=2, reason="full")), Refused(KEY, "full")),
    (
        pb.Event(cache_changed=pb.CacheChanged(stored=[b"a", b"b"], removed=[b"c"], cleared=True)),
        CacheChanged((b"a", b"b"), (b"c",), True),
    ),
    (
        pb.Event(prefilled=pb.Prefilled(transfer_id="t", attempt=2, first_token_id=3, record=WIRE_RECORD)),
        Prefilled(KEY, 3, None, RECORD),
    ),
    (
        pb.Event(
            prefilled=pb.Prefilled(
                transfer_id="t", attempt=2, first_token_id=3, finish=pb.ENGINE_FINISH_STOP, num_cached_tokens=7
            )
        ),
        Prefilled(KEY, 3, FinishReason.STOP, None, num_cached_tokens=7),
    ),
    (pb.Event(accepted=pb.Accepted(transfer_id="t", attempt=2, commit_wait_s=0.5)), Accepted(KEY, 0.5)),
    (pb.Event(released=pb.Released(transfer_id="t", attempt=2)), Released(KEY, None)),
    (
        pb.Event(
            released=pb.Released(
                transfer_id="t", attempt=2, transfer=pb.TransferStats(num_bytes=1, transfer_s=2, exposed_s=3)
            )
        ),
        Released(KEY, TransferStats(1, 2, 3)),
    ),
    (
        pb.Event(
            tokens=pb.StepTokens(
                sequences=[
                    pb.SequenceTokens(transfer_id="t", attempt=2, token_ids=[1, 2]),
                    pb.SequenceTokens(transfer_id="u", attempt=1, token_ids=[3], finish=pb.ENGINE_FINISH_LENGTH),
                ]
            )
        ),
        StepTokens((SequenceTokens(KEY, (1, 2)), SequenceTokens(("u", 1), (3,), FinishReason.LENGTH))),
    ),
    (
        pb.Event(failed=pb.AttemptFailed(transfer_id="t", attempt=2, reason="code", message="words")),
        AttemptFailed(KEY, "code", "words"),
    ),
    (pb.Event(cache_flushed=pb.CacheFlushed(num_blocks=7)), CacheFlushed(7)),
    (pb.Event(drained=pb.Drained()), Drained()),
]


@pytest.mark.parametrize(("command", "wire"), COMMANDS, ids=[type(command).__name__ for command, _ in COMMANDS])
def test_a_command_goes_to_the_wire_whole(command: Command, wire: pb.Command) -> None:
    assert command_to_wire(command) == wire


def test_every_command_of_the_wire_is_covered() -> None:
    kinds = {wire.WhichOneof("command") for _, wire in COMMANDS}
    assert kinds == {field.name for field in pb.Command.DESCRIPTOR.fields}


@pytest.mark.parametrize(("wire", "event"), EVENTS, ids=[type(event).__name__ for _, event in EVENTS])
def test_an_event_comes_from_the_wire_whole(wire: pb.Event, event: Event) -> None:
    assert message_from_wire(pb.WorkerMessage(events=[wire])).events == (event,)


def test_every_event_of_the_wire_is_covered() -> None:
    kinds = {wire.WhichOneof("event") for wire, _ in EVENTS}
    assert kinds == {field.name for field in pb.Event.DESCRIPTOR.fields}


def test_hello_and_load_come_whole() -> None:
    wire = pb.WorkerMessage(
        hello=pb.WorkerHello(
            wire_version=1,
            worker_id="w",
            incarnation="i",
            role=3,  # type: ignore[arg-type]
            layout=WIRE_LAYOUT,
            credits=4,
            num_blocks=5,
            max_model_len=6,
            kv_address="host:2",
            device="cpu",
            max_pairs=12,
        ),
        load=pb.Load(
            num_running=1,
            num_waiting=2,
            num_held=3,
            num_free_blocks=4,
            num_preemptions=5,
            num_waiting_tokens=6,
            draining=True,
            num_prefix_queries=7,
            num_prefix_hits=8,
            num_drafts=9,
            num_draft_tokens=10,
            num_accepted_tokens=11,
            mask_wait_s=0.5,
        ),
    )
    message = message_from_wire(wire)
    assert message.hello is not None
    assert message.hello.role is WorkerRole.MIXED
    assert message.hello.layout == LAYOUT
    assert (message.hello.credits, message.hello.num_blocks, message.hello.max_model_len) == (4, 5, 6)
    assert (message.hello.kv_address, message.hello.device, message.hello.wire_version) == ("host:2", "cpu", 1)
    assert message.hello.max_pairs == 12
    assert message.load == Load(1, 2, 3, 4, 5, 6, True, 7, 8, 0.5, 9, 10, 11)
    assert message_from_wire(pb.WorkerMessage()).load is None


@pytest.mark.parametrize(
    "wire",
    [
        pb.WorkerMessage(events=[pb.Event()]),
        pb.WorkerMessage(hello=pb.WorkerHello(role=0)),  # type: ignore[arg-type]
        pb.WorkerMessage(events=[pb.Event(prefilled=pb.Prefilled(finish=9))]),  # type: ignore[arg-type]
    ],
    ids=["unknown event", "no role", "unknown finish"],
)
def test_what_cannot_be_read_is_refused(wire: pb.WorkerMessage) -> None:
    with pytest.raises(WireError):
        message_from_wire(wire)
