"""Whoever stops a transfer, and whenever: nobody touches its blocks afterwards, and the channel goes on for others."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest
import torch

from core.clock import ManualClock
from core.errors import TransferError
from kernels.paged_kv import token_views
from kv_transfer.config import TransferConfig
from kv_transfer.events import TransferFailed, TransferReady
from tests.kv_transfer.harness import WAIT_S, Transfer, Worker, layout, pair, tickets
from tests.kv_transfer.memory_transport import MemoryNetwork

PATIENT = TransferConfig(lease_s=1000, silence_timeout_s=10, keepalive_s=5, streaming="layerwise")
STAGES: list[Callable[[Transfer], object]] = [
    lambda transfer: None,
    lambda transfer: transfer.begin(),
    lambda transfer: transfer.push(0, 5),
    lambda transfer: transfer.push(5),
    lambda transfer: transfer.accept(transfer.commit()),
    lambda transfer: transfer.decode.expect(TransferReady),
]


@pytest.fixture
def network() -> MemoryNetwork:
    return MemoryNetwork()


@pytest.fixture
def one_batch_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """What comes after the first batch is queued, and not on its way."""
    monkeypatch.setattr("kv_transfer.channel.WINDOW", 1)


@pytest.fixture
def both(network: MemoryNetwork) -> Iterator[tuple[Worker, Worker]]:
    with pair(config=PATIENT, network=network) as workers:
        yield workers


def prove_the_channel(prefill: Worker, decode: Worker) -> None:
    """Another transfer goes through, behind all that was sent before it."""
    other = Transfer(prefill, decode, 6)
    other.complete()
    assert other.arrived()
    other.release()


@pytest.mark.parametrize("num_stages", range(len(STAGES) + 1))
def test_cancel_in_any_stage_frees_both_sides_and_nothing_else(both: tuple[Worker, Worker], num_stages: int) -> None:
    prefill, decode = both
    transfer = Transfer(prefill, decode, 12)
    for stage in STAGES[:num_stages]:
        stage(transfer)
    for worker in both:
        worker.plane.cancel(transfer.key)
        worker.plane.cancel(transfer.key)
    before = decode.storage.read(0, transfer.target, 0, 12)
    transfer.release()
    prove_the_channel(prefill, decode)
    assert torch.equal(decode.storage.read(0, transfer.target, 0, 12), before)
    for worker in both:
        worker.plane.check_integrity()
    assert prefill.silent()


@pytest.mark.usefixtures("one_batch_at_a_time")
def test_what_is_queued_does_not_leave_after_a_cancel(both: tuple[Worker, Worker], network: MemoryNetwork) -> None:
    prefill, decode = both
    network.to_receiver[1].hold(True)
    first, second = Transfer(prefill, decode, 10), Transfer(prefill, decode, 10)
    first.begin()
    first.push()
    assert network.to_receiver[1].until_sending(WAIT_S)  # what comes from now on is not in its batch
    second.begin()
    second.push()
    before = decode.snapshot()
    prefill.plane.cancel(second.key)
    network.to_receiver[1].hold(False)
    first.accept(first.commit())
    assert decode.expect(TransferReady).key == first.key
    prove_the_channel(prefill, decode)
    assert torch.equal(decode.snapshot()[list(second.target)], before[list(second.target)])
    with pytest.raises(TransferError) as failure:
        second.commit()
    assert failure.value.reason == "cancelled"
    first.release()
    second.release()


def test_late_segments_do_not_touch_blocks_that_have_a_new_owner(
    both: tuple[Worker, Worker], network: MemoryNetwork
) -> None:
    prefill, decode = both
    network.to_receiver[1].hold(True)
    late = Transfer(prefill, decode, 10)
    late.begin()
    late.push()
    decode.plane.receiver.release(late.key)
    for layer in decode.storage.layers:
        for view in token_views(layer):
            view[list(late.target)] = 7.0  # written by the blocks' new owner
    network.to_receiver[1].hold(False)
    prove_the_channel(prefill, decode)
    assert bool((decode.snapshot()[list(late.target)] == 7.0).all())
    assert decode.plane.receiver.num_discarded_segments > 0
    prefill.plane.sender.release(late.key)


def test_segments_of_an_unknown_ticket_are_discarded_and_the_channel_goes_on(both: tuple[Worker, Worker]) -> None:
    prefill, decode = both
    unknown = Transfer(prefill, decode, 10)
    before = decode.snapshot()
    prefill.plane.sender.begin(unknown.ticket)
    unknown.push()
    prove_the_channel(prefill, decode)
    held = list(unknown.target)
    assert torch.equal(decode.snapshot()[list(held)], before[list(held)])
    assert decode.plane.receiver.num_discarded_segments == 3
    prefill.plane.sender.release(unknown.key)


def test_what_is_said_of_an_unknown_ticket_changes_nothing(both: tuple[Worker, Worker]) -> None:
    prefill, decode = both
    transfer = Transfer(prefill, decode, 4)
    transfer.begin()
    transfer.push()
    record = transfer.commit()
    unknown = ("f" * 32, 1)
    prefill.plane.sender.push(unknown, 0, 0, 4, transfer.source)
    decode.plane.receiver.accept(unknown, record, 1.0)
    assert prefill.plane.sender.release(unknown) is None
    decode.plane.receiver.release(unknown)
    transfer.accept(record)
    assert decode.expect(TransferReady).key == transfer.key
    transfer.release()


def test_a_newer_attempt_fences_the_older_on_both_sides(both: tuple[Worker, Worker]) -> None:
    prefill, decode = both
    old = Transfer(prefill, decode, 8)
    old.begin()
    old.push(0, 4)
    new = Transfer(prefill, decode, 8, ticket=tickets("p", "d", 1, 2, old.ticket.transfer_id))
    new.begin()
    for worker in both:
        failed = worker.expect(TransferFailed)
        assert (failed.key, failed.reason) == (old.key, "stale_attempt")
    before = decode.snapshot()[list(old.target)]
    old.push(4)
    new.push()
    new.accept(new.commit())
    assert decode.expect(TransferReady).key == new.key
    assert new.arrived()
    assert torch.equal(decode.snapshot()[list(old.target)], before)
    for begin in (old.begin, lambda: prefill.plane.sender.begin(old.ticket)):
        with pytest.raises(TransferError) as failure:
            begin()
        assert failure.value.reason == "stale_attempt"
    new.release()


def test_a_cancel_wakes_a_push_that_waits_for_room(network: MemoryNetwork) -> None:
    config = TransferConfig(lease_s=1000, silence_timeout_s=30, keepalive_s=5, max_staging_mib=1, streaming="layerwise")
    shape = layout(block_size=4096, num_layers=4)  # 512 KiB of a layer's K and V: two fill the staging
    with pair(config=config, network=network, prefill_layout=shape, decode_layout=shape) as (prefill, decode):
        network.to_receiver[1].hold(True)
        transfer = Transfer(prefill, decode, 4096)
        transfer.begin()
        pushing = threading.Thread(target=transfer.push, daemon=True)
        pushing.start()
        pushing.join(0.2)
        assert pushing.is_alive()
        prefill.plane.cancel(transfer.key)
        pushing.join(WAIT_S)
        assert not pushing.is_alive()
        assert prefill.silent()
        network.to_receiver[1].hold(False)
        transfer.release()


def test_a_prefill_that_the_link_cannot_follow_fails_its_transfer_and_not_the_step(network: MemoryNetwork) -> None:
    config = TransferConfig(silence_timeout_s=0.5, keepalive_s=0.1, max_staging_mib=1, streaming="layerwise")
    shape = layout(block_size=4096, num_layers=4)
    with pair(config=config, network=network, prefill_layout=shape, decode_layout=shape) as (prefill, decode):
        network.to_receiver[1].hold(True)
        transfer = Transfer(prefill, decode, 4096)
        transfer.begin()
        transfer.push()
        failed = prefill.expect(TransferFailed)
        assert failed.key == transfer.key
        assert failed.reason in ("staging_full", "pair_down")
        with pytest.raises(TransferError) as failure:
            transfer.commit()
        assert failure.value.reason == failed.reason
        transfer.release()


def test_expiry_is_told_once_and_stops_both_sides(network: MemoryNetwork) -> None:
    clock = ManualClock()
    config = TransferConfig(lease_s=5, silence_timeout_s=10, keepalive_s=5, streaming="layerwise")
    with pair(config=config, network=network, clock=clock) as (prefill, decode):
        lost, wanted = Transfer(prefill, decode, 8), Transfer(prefill, decode, 8)
        for transfer in (lost, wanted):
            transfer.begin()
        clock.advance(4)
        for worker in (prefill, decode):
            worker.plane.renew([wanted.ticket.transfer_id], clock())
        clock.advance(1)
        for worker in (prefill, decode):
            assert worker.plane.expired(clock()) == [(lost.key, "lease_expired")]
            assert worker.plane.expired(clock()) == []
        before = decode.snapshot()[list(lost.target)]
        lost.push()
        wanted.push()
        wanted.accept(wanted.commit())
        assert decode.expect(TransferReady).key == wanted.key
        assert torch.equal(decode.snapshot()[list(lost.target)], before)
        lost.release()
        wanted.release()


def test_nothing_is_sent_or_published_after_a_lease_has_ended_unnoticed(network: MemoryNetwork) -> None:
    clock = ManualClock()
    config = TransferConfig(lease_s=5, silence_timeout_s=10, keepalive_s=5, streaming="layerwise")
    with pair(config=config, network=network, clock=clock) as (prefill, decode):
        transfer = Transfer(prefill, decode, 8)
        transfer.begin()
        transfer.push()
        record = transfer.commit()
        clock.advance(6)
        transfer.accept(record)
        assert decode.expect(TransferFailed).reason == "lease_expired"
        late = Transfer(prefill, decode, 8)
        late.begin()
        clock.advance(6)
        late.push()
        assert prefill.expect(TransferFailed).reason == "lease_expired"
        transfer.release()
        late.release()


def test_a_local_attempt_lives_by_its_lease_alone(network: MemoryNetwork) -> None:
    clock = ManualClock()
    with pair(config=PATIENT, network=network, clock=clock) as (_, decode):
        ticket = tickets("d", "d", 0)
        decode.plane.receiver.begin_local(ticket)
        clock.advance(999)
        assert decode.plane.expired(clock()) == []
        clock.advance(1)
        assert decode.plane.expired(clock()) == [(ticket.key, "lease_expired")]
        decode.plane.receiver.release(ticket.key)
