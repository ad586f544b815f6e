"""What arrives is what was sent, over shared memory and real process groups."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest
import torch

from core.messages import TransferStats
from kv_transfer.config import Backend, TransferConfig
from kv_transfer.events import TransferReady
from kv_transfer.frame import MAX_PAYLOAD_BYTES
from tests.kv_transfer.harness import QUICK, Transfer, connect, layout, pair


@pytest.mark.parametrize(
    ("dtype", "kind"),
    [("float32", "heads"), ("bfloat16", "heads"), ("float16", "heads"), ("int8", "heads"), ("bfloat16", "latent")],
)
@pytest.mark.parametrize(("ours", "theirs"), [(4, 4), (16, 4), (3, 8)])
@pytest.mark.parametrize("backend", ["shm", "gloo"])
def test_chunks_arrive_bit_by_bit_whatever_the_block_sizes(
    backend: Backend, dtype: str, kind: str, ours: int, theirs: int
) -> None:
    config = replace(QUICK, backend=backend)
    shapes = tuple(layout(block_size=size, dtype=dtype, kind=kind) for size in (ours, theirs))
    with pair(config=config, prefill_layout=shapes[0], decode_layout=shapes[1]) as (prefill, decode):
        transfer = Transfer(prefill, decode, 37)
        before, blocks = decode.snapshot(), set(transfer.target)
        transfer.begin()
        for start, end in itertools.pairwise((0, 1, 20, 33, 37)):
            transfer.push(start, end)
        transfer.accept(transfer.commit())
        assert decode.expect(TransferReady).key == transfer.key
        assert transfer.arrived()
        others = [block for block in range(decode.storage.num_blocks) if block not in blocks]
        assert torch.equal(decode.snapshot()[others], before[others])
        transfer.release()


def test_many_transfers_share_a_channel_without_mixing() -> None:
    with pair() as (prefill, decode):
        transfers = [Transfer(prefill, decode, num_tokens) for num_tokens in (3, 17, 40, 9)]
        for transfer in transfers:
            transfer.begin()
        pushes = [(transfer, layer) for transfer in transfers for layer in range(3)]
        random.Random(5).shuffle(pushes)
        for transfer, layer in pushes:
            transfer.push(layers=[layer])
        for transfer in transfers:
            transfer.accept(transfer.commit())
        ready = {decode.expect(TransferReady).key for _ in transfers}
        assert ready == {transfer.key for transfer in transfers}
        assert all(transfer.arrived() for transfer in transfers)
        for transfer in transfers:
            transfer.release()


def test_positions_that_are_there_already_do_not_travel() -> None:
    with pair() as (prefill, decode):
        transfer = Transfer(prefill, decode, 22, num_skipped=9)
        skipped = decode.storage.read(0, transfer.target, 0, 9)
        transfer.begin()
        transfer.push(0, 5)
        transfer.push(5, 22)
        record = transfer.commit()
        assert {(s.segment.token_start, s.segment.token_end) for s in record.segments} == {(9, 22)}
        transfer.accept(record)
        decode.expect(TransferReady)
        assert transfer.arrived()
        assert torch.equal(decode.storage.read(0, transfer.target, 0, 9), skipped)
        transfer.release()


def test_segments_are_on_their_way_before_the_commit() -> None:
    with pair() as (prefill, decode):
        transfer = Transfer(prefill, decode, 12)
        transfer.begin()
        transfer.push()
        behind = Transfer(prefill, decode, 1)  # leaves after them, so its arrival proves theirs
        behind.complete()
        assert transfer.arrived()
        transfer.accept(transfer.commit())
        assert decode.expect(TransferReady).commit_wait_s < 1.0
        transfer.release()
        behind.release()


def test_a_record_may_come_before_the_last_segment() -> None:
    with pair() as (prefill, decode):
        transfer = Transfer(prefill, decode, 12)
        transfer.begin()
        transfer.push(layers=[0, 1])
        prefill.plane.sender.push(transfer.key, 2, 0, 12, transfer.source)
        record = transfer.commit()
        transfer.accept(record)
        transfer.accept(record)  # said again: changes nothing
        assert decode.expect(TransferReady).key == transfer.key
        assert decode.silent()
        transfer.release()


@pytest.mark.parametrize("backend", ["shm", "tcp", "gloo"])
def test_a_layer_too_large_for_one_message_is_cut(backend: Backend) -> None:
    shape = layout(block_size=4096, num_layers=1)
    num_tokens = MAX_PAYLOAD_BYTES // shape.bytes_per_token_per_layer + 100
    with pair(prefill_layout=shape, decode_layout=shape, config=TransferConfig(backend=backend)) as (prefill, decode):
        transfer = Transfer(prefill, decode, num_tokens)
        transfer.begin()
        transfer.push()
        record = transfer.commit()
        assert len(record.segments) > 1
        assert all(s.num_bytes <= MAX_PAYLOAD_BYTES for s in record.segments)
        transfer.accept(record)
        assert decode.expect(TransferReady).key == transfer.key
        assert transfer.arrived()
        transfer.release()


def test_a_release_tells_what_the_transfer_cost() -> None:
    with pair() as (prefill, decode):
        transfer = Transfer(prefill, decode, 20)
        transfer.complete()
        stats = prefill.plane.sender.release(transfer.key)
        assert isinstance(stats, TransferStats)
        assert stats.num_bytes == 20 * 3 * prefill.layout.bytes_per_token_per_layer
        assert stats.transfer_s > 0
        assert stats.exposed_s >= 0
        assert prefill.plane.sender.release(transfer.key) is None
        decode.plane.receiver.release(transfer.key)


def test_a_worker_may_send_and_receive_over_pairs_of_its_own() -> None:
    with pair() as (a, b):
        connect(b, a, epoch=7)
        there, back = Transfer(a, b, 10), Transfer(b, a, 11, epoch=7)
        there.complete()
        back.complete()
        assert there.arrived()
        assert back.arrived()
        there.release()
        back.release()
