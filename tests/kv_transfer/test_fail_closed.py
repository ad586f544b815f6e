"""What does not equal what was sent is never decoded, and hurts nobody else."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from core.clock import ManualClock
from core.errors import IntegrityError, TransferError
from core.messages import PairDown
from core.ticket import CommitRecord
from kernels.checksum import checksum
from kv_transfer.config import TransferConfig
from kv_transfer.events import TransferFailed, TransferReady
from kv_transfer.frame import FRAME_BYTES, Entry, Frame, FrameKind, pack, unpack
from tests.kv_transfer.harness import Transfer, Worker, pair
from tests.kv_transfer.memory_transport import MemoryNetwork, Wire

PATIENT = TransferConfig(silence_timeout_s=10, keepalive_s=0.5, lease_s=1000, streaming="layerwise")


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def network() -> MemoryNetwork:
    return MemoryNetwork()


@pytest.fixture
def both(network: MemoryNetwork, clock: ManualClock) -> Iterator[tuple[Worker, Worker]]:
    with pair(config=PATIENT, network=network, clock=clock) as workers:
        yield workers


def flip(message: Tensor, byte: int = 3) -> Tensor:
    message[byte] ^= 1
    return message


def damage_payload(wire: Wire, damage: Callable[[Tensor], Tensor]) -> None:
    wire.damage = lambda message: message if message.numel() == FRAME_BYTES else damage(message)


def rewrite_frames(wire: Wire, rewrite: Callable[[Entry], Entry]) -> None:
    """Change the entries of frames on the way, with a right CRC: a sender of ours that is wrong."""

    def damage(message: Tensor) -> Tensor:
        if (
            message.numel() != FRAME_BYTES
            or (frame := unpack(message.numpy().tobytes())).kind is not FrameKind.SEGMENTS
        ):
            return message
        changed = Frame(frame.kind, tuple(map(rewrite, frame.entries)))
        return torch.frombuffer(bytearray(pack(changed)), dtype=torch.uint8)

    wire.damage = damage


def test_a_damaged_payload_fails_its_transfer_alone(both: tuple[Worker, Worker], network: MemoryNetwork) -> None:
    prefill, decode = both
    wire = network.to_receiver[1]
    damaged, whole = Transfer(prefill, decode, 9), Transfer(prefill, decode, 9)
    damaged.begin()
    whole.begin()
    before, others = decode.snapshot(), [b for b in range(decode.storage.num_blocks) if b not in damaged.target]
    damage_payload(wire, flip)
    damaged.push(layers=[0])
    failed = decode.expect(TransferFailed)
    assert (failed.key, failed.reason) == (damaged.key, "checksum_mismatch")
    assert torch.equal(decode.snapshot()[others], before[others])
    damage_payload(wire, lambda message: message)
    damaged.push(layers=[1, 2])
    whole.push()
    whole.accept(whole.commit())
    damaged.accept(damaged.commit())
    assert decode.expect(TransferReady).key == whole.key
    assert whole.arrived()
    assert decode.silent()
    others = [b for b in others if b not in whole.target]
    assert torch.equal(decode.snapshot()[others], before[others])
    damaged.release()
    whole.release()


@pytest.mark.parametrize("byte", [0, 5, 7, 40, 4090])
def test_a_damaged_header_takes_the_channel_down(
    both: tuple[Worker, Worker], network: MemoryNetwork, byte: int
) -> None:
    prefill, decode = both
    transfer = Transfer(prefill, decode, 9)
    transfer.begin()
    before = decode.snapshot()
    network.to_receiver[1].damage = lambda message: flip(message, byte) if message.numel() == FRAME_BYTES else message
    transfer.push()
    for worker in both:
        assert worker.expect(TransferFailed).key == transfer.key
        assert worker.expect(PairDown).epoch == 1
        assert worker.silent()
    assert torch.equal(decode.snapshot(), before)
    transfer.release()


def test_a_header_that_names_another_payload_size_is_never_guessed(
    both: tuple[Worker, Worker], network: MemoryNetwork
) -> None:
    prefill, decode = both
    transfer = Transfer(prefill, decode, 9)
    transfer.begin()

    def shorter(entry: Entry) -> Entry:
        return dataclasses.replace(
            entry, record=dataclasses.replace(entry.record, num_bytes=entry.record.num_bytes - 4)
        )

    rewrite_frames(network.to_receiver[1], shorter)
    transfer.push(layers=[0])
    assert decode.expect(TransferFailed).reason == "pair_down"
    assert decode.expect(PairDown).epoch == 1
    transfer.release()


@pytest.mark.parametrize(
    "change",
    [
        {"layer": 3},
        {"token_start": 1},
        {"token_end": 10},
        {"token_end": 2**32 - 1},
        {"kv_head_end": 1},
        {"token_start": 9, "token_end": 18},
    ],
)
def test_a_segment_that_does_not_fit_its_ticket_is_not_written(
    both: tuple[Worker, Worker], network: MemoryNetwork, change: dict[str, int]
) -> None:
    prefill, decode = both
    transfer = Transfer(prefill, decode, 9)
    transfer.begin()
    before = decode.snapshot()

    def misplaced(entry: Entry) -> Entry:
        segment = dataclasses.replace(entry.record.segment, **change)
        return dataclasses.replace(entry, record=dataclasses.replace(entry.record, segment=segment))

    rewrite_frames(network.to_receiver[1], misplaced)
    transfer.push(layers=[0])
    assert decode.expect(TransferFailed).reason == "unexpected_segment"
    assert torch.equal(decode.snapshot(), before)
    transfer.release()


def test_a_segment_in_blocks_of_another_size_is_not_written(
    both: tuple[Worker, Worker], network: MemoryNetwork
) -> None:
    prefill, decode = both
    transfer = Transfer(prefill, decode, 9)
    transfer.begin()
    before = decode.snapshot()
    rewrite_frames(network.to_receiver[1], lambda e: dataclasses.replace(e, block_size=2 * e.block_size))
    transfer.push(layers=[0])
    assert decode.expect(TransferFailed).reason == "unexpected_segment"
    assert torch.equal(decode.snapshot(), before)
    transfer.release()


def test_a_segment_never_overwrites_the_prefix_that_is_there_already(both: tuple[Worker, Worker]) -> None:
    prefill, decode = both
    transfer = Transfer(prefill, decode, 9)
    prefill.plane.sender.begin(transfer.ticket)
    decode.plane.receiver.begin(transfer.ticket, transfer.target, 9, transfer.token_ids[:4])
    before = decode.snapshot()
    transfer.push(3, 9, layers=[0])
    assert decode.expect(TransferFailed).reason == "unexpected_segment"
    assert torch.equal(decode.snapshot(), before)
    transfer.release()


def test_a_segment_that_comes_twice_fails_the_transfer(both: tuple[Worker, Worker]) -> None:
    prefill, decode = both
    transfer = Transfer(prefill, decode, 9)
    transfer.begin()
    transfer.push()
    transfer.push(layers=[1])
    assert decode.expect(TransferFailed).reason == "duplicate_segment"
    transfer.release()


def test_a_missing_segment_is_noticed_at_the_deadline(both: tuple[Worker, Worker], clock: ManualClock) -> None:
    prefill, decode = both
    transfer, reference = Transfer(prefill, decode, 9), Transfer(prefill, decode, 9)
    for each in (transfer, reference):
        each.begin()
    transfer.push(layers=[0, 1])
    reference.push()
    transfer.accept(reference.commit(), deadline_s=2.0)
    clock.advance(1.9)
    assert decode.plane.expired(clock()) == []
    clock.advance(0.2)
    assert decode.plane.expired(clock()) == [(transfer.key, "progress_deadline")]
    transfer.push(layers=[2])
    behind = Transfer(prefill, decode, 3)
    behind.complete()
    assert decode.silent()  # too late: it stays failed
    for each in (transfer, reference, behind):
        each.release()


def test_segments_do_not_move_the_deadline_of_an_accept(both: tuple[Worker, Worker], clock: ManualClock) -> None:
    prefill, decode = both
    transfer, reference = Transfer(prefill, decode, 9), Transfer(prefill, decode, 9)
    for each in (transfer, reference):
        each.begin()
    reference.push()
    transfer.accept(reference.commit(), deadline_s=2.0)
    clock.advance(1.9)
    transfer.push(layers=[0])
    behind = Transfer(prefill, decode, 3)
    behind.complete()
    clock.advance(0.2)
    assert decode.plane.expired(clock()) == [(transfer.key, "progress_deadline")]
    for each in (transfer, reference, behind):
        each.release()


def drop_last(record: CommitRecord) -> CommitRecord:
    return dataclasses.replace(record, segments=record.segments[:-1])


def other_checksum(record: CommitRecord) -> CommitRecord:
    first = dataclasses.replace(record.segments[0], checksum=record.segments[0].checksum ^ 1)
    return dataclasses.replace(record, segments=(first, *record.segments[1:]))


def other_size(record: CommitRecord) -> CommitRecord:
    first = dataclasses.replace(record.segments[0], num_bytes=record.segments[0].num_bytes + 4)
    return dataclasses.replace(record, segments=(first, *record.segments[1:]))


def fewer_tokens(record: CommitRecord) -> CommitRecord:
    return dataclasses.replace(record, num_tokens=record.num_tokens - 1)


def more_skipped(record: CommitRecord) -> CommitRecord:
    return dataclasses.replace(record, num_skipped_tokens=1)


def other_prefix(record: CommitRecord) -> CommitRecord:
    return dataclasses.replace(record, skipped_prefix_hash=bytes(16))


def nothing(record: CommitRecord) -> CommitRecord:
    return dataclasses.replace(record, segments=())


@pytest.mark.parametrize(
    "falsify", [drop_last, other_checksum, other_size, fewer_tokens, more_skipped, other_prefix, nothing]
)
@pytest.mark.parametrize("early", [True, False])
def test_a_record_that_is_not_of_what_came_fails_the_transfer(
    both: tuple[Worker, Worker], falsify: Callable[[CommitRecord], CommitRecord], early: bool
) -> None:
    prefill, decode = both
    transfer, reference = Transfer(prefill, decode, 9, num_skipped=0), Transfer(prefill, decode, 9)
    for each in (transfer, reference):
        each.begin()
    for layer in range(prefill.layout.num_layers):
        prefill.plane.sender.push(reference.key, layer, 0, 9, transfer.source)
    record = falsify(reference.commit())
    if early:
        transfer.accept(record)
    transfer.push()
    if not early:
        behind = Transfer(prefill, decode, 3)
        behind.complete()
        behind.release()
        transfer.accept(record)
    assert decode.expect(TransferFailed).reason == "record_mismatch"
    assert decode.silent()
    transfer.release()
    reference.release()


def test_more_than_the_record_says_fails_the_transfer(both: tuple[Worker, Worker]) -> None:
    prefill, decode = both
    transfer, reference = Transfer(prefill, decode, 9), Transfer(prefill, decode, 9)
    for each in (transfer, reference):
        each.begin()
    for layer in range(prefill.layout.num_layers):
        prefill.plane.sender.push(reference.key, layer, 0, 9, transfer.source)
    record = reference.commit()
    transfer.push(0, 4, layers=[0])  # on top of the record
    transfer.push()
    behind = Transfer(prefill, decode, 3)
    behind.complete()
    transfer.accept(record)
    assert decode.expect(TransferFailed).reason == "record_mismatch"
    for each in (transfer, reference, behind):
        each.release()


def test_the_checksum_is_taken_from_what_came(both: tuple[Worker, Worker], network: MemoryNetwork) -> None:
    """Headers that lie in step with the payload pass segment by segment, and fail at the record."""
    prefill, decode = both
    transfer = Transfer(prefill, decode, 9)
    transfer.begin()
    zeros = torch.zeros(9 * prefill.layout.bytes_per_token_per_layer, dtype=torch.uint8)
    wire = network.to_receiver[1]
    rewrite_frames(wire, lambda e: Entry(e.key, dataclasses.replace(e.record, checksum=checksum(zeros))))
    frames = wire.damage
    wire.damage = lambda message: frames(message) if message.numel() == FRAME_BYTES else message * 0
    transfer.push()
    transfer.accept(transfer.commit())
    assert decode.expect(TransferFailed).reason == "record_mismatch"
    transfer.release()


def test_a_failure_of_ours_in_a_channel_takes_it_down_and_is_shown(
    both: tuple[Worker, Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefill, decode = both
    transfer = Transfer(prefill, decode, 9)
    shown: list[object] = []
    monkeypatch.setattr("threading.excepthook", shown.append)
    prefill.plane.sender.begin(transfer.ticket)
    decode.plane.receiver.begin(transfer.ticket, (decode.storage.num_blocks,) * 3, 9)  # blocks that do not exist
    transfer.push()
    for worker in both:
        assert worker.expect(TransferFailed).reason == "pair_down"
        assert worker.expect(PairDown).epoch == 1
    assert len(shown) == 1
    transfer.release()


def test_blocks_that_cannot_hold_the_prompt_are_refused_before_anything_is_held(both: tuple[Worker, Worker]) -> None:
    prefill, decode = both
    transfer = Transfer(prefill, decode, 9)
    with pytest.raises(IntegrityError, match="9 tokens do not fit into 2 blocks"):
        decode.plane.receiver.begin(transfer.ticket, transfer.target[:2], 9)
    decode.plane.check_integrity()
    transfer.complete()
    transfer.release()


def test_an_error_says_where(both: tuple[Worker, Worker]) -> None:
    prefill, decode = both
    with pytest.raises(TransferError, match=r"transfer id .* must be 1 to 32 ASCII"):
        prefill.plane.sender.begin(dataclasses.replace(Transfer(prefill, decode, 4).ticket, transfer_id="x" * 33))
