"""Pairs come up, are replaced and end; each end is told once, and no thread stays behind."""

from __future__ import annotations

import dataclasses
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import psutil
import pytest
import torch

from core.errors import TransferError
from core.kv_layout import KVLayout
from core.messages import Connect, PairDown, PairUp
from core.ticket import AttemptKey, Ticket
from engine.kv_storage import KVStorage
from kv_transfer.config import TransferConfig
from kv_transfer.events import KVEvent, TransferFailed, TransferReady
from kv_transfer.plane import KVPlane
from tests.kv_transfer.harness import (
    HOST,
    QUICK,
    WAIT_S,
    Transfer,
    Worker,
    connect,
    connects,
    layout,
    pair,
    plane_threads,
    tickets,
)
from tests.kv_transfer.memory_transport import MemoryNetwork

HASTY = TransferConfig(connect_timeout_s=0.5, silence_timeout_s=1.0, keepalive_s=0.2, streaming="layerwise")


@contextmanager
def workers(config: TransferConfig, *shapes: KVLayout, network: MemoryNetwork | None = None) -> Iterator[list[Worker]]:
    """Workers w0, w1, ..., not connected."""
    with ExitStack() as stack:
        made = [Worker(f"w{i}", shape, config, network=network) for i, shape in enumerate(shapes)]
        for worker in made:
            stack.callback(worker.plane.close)
        yield made


def no_pair_is_left() -> bool:
    """True as soon as the threads of pairs are gone; each says goodbye within the wait."""
    ends_at = time.monotonic() + WAIT_S
    for thread in threading.enumerate():
        if thread.name in plane_threads(but="kv-w"):
            thread.join(max(0.0, ends_at - time.monotonic()))
    return plane_threads(but="kv-w") == []


def test_layouts_that_differ_never_pair() -> None:
    with workers(QUICK, layout(), layout(num_layers=4)) as (prefill, decode):
        to_prefill, _ = connects(prefill, decode, 1)
        prefill.plane.connect(to_prefill)
        down = prefill.expect(PairDown)
        assert down == PairDown("w0", "w1", 1, "num_layers: 3 on one side, 4 on the other", permanent=True)
        assert no_pair_is_left()


def test_a_pair_of_others_is_refused_for_good() -> None:
    with workers(QUICK, layout()) as (worker,):
        worker.plane.connect(Connect("x", "y", 1, worker.plane.address, layout()))
        assert worker.expect(PairDown).permanent


def test_the_handshake_finds_out_a_peer_that_is_not_what_the_router_said() -> None:
    with workers(QUICK, layout(), layout(fingerprint="other weights")) as (prefill, decode):
        to_prefill, to_decode = connects(prefill, decode, 1)
        prefill.plane.connect(dataclasses.replace(to_prefill, peer_layout=prefill.layout))
        decode.plane.connect(dataclasses.replace(to_decode, peer_layout=decode.layout))
        downs = [worker.expect(PairDown) for worker in (prefill, decode)]
        assert any("not of the pair, epoch and layout" in down.reason for down in downs)
        assert not any(down.permanent for down in downs)


@pytest.mark.parametrize("side", [0, 1])
def test_a_peer_that_does_not_come_is_given_up_in_time(side: int) -> None:
    with workers(HASTY, layout(), layout()) as (prefill, decode):
        started_at = time.monotonic()
        worker = (prefill, decode)[side]
        worker.plane.connect(connects(prefill, decode, 1)[side])
        assert not worker.expect(PairDown).permanent
        assert time.monotonic() - started_at < HASTY.connect_timeout_s + 1.0
        assert no_pair_is_left()


def test_a_peer_that_does_not_listen_is_known_at_once() -> None:
    with workers(QUICK, layout()) as (worker,), socket.create_server((HOST, 0)) as server:
        address = f"{HOST}:{server.getsockname()[1]}"
        server.close()
        started_at = time.monotonic()
        worker.plane.connect(Connect("w0", "d", 1, address, layout()))
        assert "refused" in worker.expect(PairDown).reason
        assert time.monotonic() - started_at < 1.0


@pytest.mark.parametrize("address", ["", "nonsense", f"{HOST}:port"])
def test_an_address_that_is_none_takes_the_pair_down(address: str) -> None:
    with workers(QUICK, layout()) as (worker,):
        worker.plane.connect(Connect("w0", "d", 1, address, layout()))
        assert "can't be reached" in worker.expect(PairDown).reason


def test_a_peer_that_says_nothing_is_given_up_in_time() -> None:
    """The address of a process that is stopped: the system takes the connection, nobody answers."""
    with workers(HASTY, layout()) as (worker,), socket.create_server((HOST, 0)) as stopped:
        worker.plane.connect(Connect("w0", "d", 1, f"{HOST}:{stopped.getsockname()[1]}", layout()))
        assert "did not come" in worker.expect(PairDown).reason
        assert no_pair_is_left()


def test_closing_wakes_who_still_waits_for_a_peer() -> None:
    patient = TransferConfig(connect_timeout_s=60, streaming="layerwise")
    with workers(patient, layout(), layout()) as (prefill, decode), socket.create_server((HOST, 0)) as stopped:
        decode.plane.connect(connects(prefill, decode, 1)[1])
        prefill.plane.connect(Connect("w0", "d", 1, f"{HOST}:{stopped.getsockname()[1]}", layout()))
        stopped.accept()  # it has come, and waits to be answered
        started_at = time.monotonic()
        for worker in (prefill, decode):
            worker.plane.close()
        assert time.monotonic() - started_at < 5.0
        assert plane_threads() == []


def test_a_sender_may_come_before_the_receiver_has_heard_of_the_pair() -> None:
    with workers(QUICK, layout(), layout()) as (prefill, decode):
        to_prefill, to_decode = connects(prefill, decode, 1)
        prefill.plane.connect(to_prefill)
        with pytest.raises(queue.Empty):
            prefill.events.get(timeout=0.1)
        decode.plane.connect(to_decode)
        for worker in (prefill, decode):
            worker.expect(PairUp)


def test_strangers_at_the_door_do_not_keep_a_pair_out() -> None:
    with workers(QUICK, layout(), layout()) as (prefill, decode), ExitStack() as strangers:
        host, _, port = decode.plane.address.rpartition(":")
        for greeting in (b"GET / HTTP/1.1\r\n\r\n", b"", b"x" * 5):
            stranger = strangers.enter_context(socket.create_connection((host, int(port)), WAIT_S))
            stranger.sendall(greeting)
        socket.create_connection((host, int(port)), WAIT_S).close()
        connect(prefill, decode)
        transfer = Transfer(prefill, decode, 5)
        transfer.complete()
        transfer.release()


def test_the_same_connect_again_repeats_the_answer_and_keeps_the_channel() -> None:
    with pair() as (prefill, decode):
        threads = plane_threads()
        for worker, command in zip((prefill, decode), connects(prefill, decode, 1), strict=True):
            worker.plane.connect(command)
            assert worker.expect(PairUp).epoch == 1
        assert plane_threads() == threads
        transfer = Transfer(prefill, decode, 5)
        transfer.complete()
        transfer.release()


def test_an_epoch_that_is_over_is_refused() -> None:
    with pair() as (prefill, decode):
        connect_again(prefill, decode, 5)
        to_prefill, _ = connects(prefill, decode, 3)
        prefill.plane.connect(to_prefill)
        assert prefill.expect(PairDown).epoch == 3
        transfer = Transfer(prefill, decode, 5, epoch=5)
        transfer.complete()
        transfer.release()


def test_a_later_epoch_replaces_the_channel_and_fails_what_it_carried() -> None:
    with pair() as (prefill, decode):
        old = Transfer(prefill, decode, 8)
        old.begin()
        for worker, command in zip((prefill, decode), connects(prefill, decode, 2), strict=True):
            worker.plane.connect(command)
        for worker in (prefill, decode):
            failed, down = worker.expect(TransferFailed), worker.expect(PairDown)
            assert (failed.key, failed.reason, down.epoch) == (old.key, "pair_down", 1)
            assert worker.expect(PairUp).epoch == 2
        new = Transfer(prefill, decode, 8, epoch=2)
        new.complete()
        assert new.arrived()
        old.release()
        new.release()


def test_the_end_of_one_pair_does_not_touch_another() -> None:
    with workers(QUICK, layout(), layout(), layout()) as (prefill, first, second):
        for decode in (first, second):
            connect(prefill, decode)
        broken, whole = Transfer(prefill, first, 6), Transfer(prefill, second, 6)
        for transfer in (broken, whole):
            transfer.begin()
        first.plane.close()
        assert prefill.expect(TransferFailed).key == broken.key
        assert prefill.expect(PairDown).decode_incarnation == first.name
        whole.push()
        whole.accept(whole.commit())
        assert second.expect(TransferReady).key == whole.key
        assert whole.arrived()
        assert prefill.silent()


def test_a_pair_that_no_transport_suits_is_down_for_good_and_says_why() -> None:
    prefill = Worker("p", layout(), dataclasses.replace(QUICK, backend="gloo"))
    decode = Worker("d", layout(), dataclasses.replace(QUICK, backend="shm"))
    try:
        for worker, command in zip((prefill, decode), connects(prefill, decode, 1), strict=True):
            worker.plane.connect(command)
        for worker in (prefill, decode):
            down = worker.expect(PairDown)
            assert down.permanent
            assert down.reason == "transfer.backend is gloo on the sender's side and shm on the receiver's"
    finally:
        prefill.plane.close()
        decode.plane.close()


def test_what_has_come_completely_outlives_its_pair() -> None:
    with pair() as (prefill, decode):
        whole, partial = Transfer(prefill, decode, 8), Transfer(prefill, decode, 8)
        whole.complete()
        sender = prefill.plane.sender
        with sender._changed:  # its last segment may be with the peer before the sender has noticed
            assert sender._changed.wait_for(lambda: sender._sending[whole.key].all_sent, WAIT_S)
        partial.begin()
        partial.push(layers=[0])
        connect_again(prefill, decode, 2, lost=[partial.key])
        assert prefill.plane.sender.release(whole.key) is not None
        assert whole.arrived()
        whole.release()
        partial.release()


def test_the_word_of_a_pairs_end_never_overtakes_that_of_its_beginning() -> None:
    """A channel that breaks while its PairUp is being told."""
    network = MemoryNetwork()
    told: list[KVEvent] = []
    down = threading.Event()

    def notify(event: KVEvent) -> None:
        if isinstance(event, PairUp):
            network.to_receiver[1].break_()
            assert not down.wait(0.2)
        told.append(event)
        if isinstance(event, PairDown):
            down.set()

    with workers(QUICK, layout(), network=network) as (prefill,):
        storage = KVStorage(layout(), 1, torch.device("cpu"))
        rendezvous = network.rendezvous("d", QUICK.connect_timeout_s)
        plane = KVPlane("d", storage, HOST, QUICK, time.monotonic, notify, rendezvous)
        plane.connect(Connect("w0", "d", 1, "", layout()))
        prefill.plane.connect(Connect("w0", "d", 1, "", layout()))
        assert down.wait(WAIT_S)
        plane.close()
    assert [type(event) for event in told] == [PairUp, PairDown]


def test_a_transfer_that_begins_while_its_pair_ends_is_not_forgotten() -> None:
    with pair() as (_, decode):
        receiver, ticket = decode.plane.receiver, tickets("p", "d", 1)
        check = decode.plane._pairs.check_receiving

        def check_at_the_last_moment(ticket: Ticket) -> None:
            check(ticket)
            receiver.on_pair_down(("p", "d"), 1, "the peer went away")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decode.plane._pairs, "check_receiving", check_at_the_last_moment)
            receiver.begin(ticket, decode.take_blocks(4), 4)
        assert decode.expect(TransferFailed).key == ticket.key
        receiver.release(ticket.key)


@pytest.mark.parametrize("closing", [0, 1])
def test_who_closes_is_noticed_and_told_once(closing: int) -> None:
    with pair() as both:
        transfer = Transfer(*both, 8)
        transfer.begin()
        other = both[1 - closing]
        both[closing].plane.close()
        assert other.expect(TransferFailed, 3.0).reason == "pair_down"
        assert other.expect(PairDown, 3.0).epoch == 1
        with pytest.raises(TransferError, match="not up"):
            Transfer(*both, 4).begin()
        transfer.release()
    assert other.silent()


def test_a_ticket_needs_a_live_channel_of_its_epoch_and_direction() -> None:
    with pair() as (prefill, decode):
        begins: list[Callable[[], None]] = [
            lambda: prefill.plane.sender.begin(tickets("p", "d", 2)),
            lambda: prefill.plane.sender.begin(tickets("p", "x", 1)),
            lambda: decode.plane.sender.begin(tickets("p", "d", 1)),
            lambda: decode.plane.receiver.begin(tickets("p", "d", 2), (1,), 4),
            lambda: prefill.plane.receiver.begin(tickets("p", "d", 1), (1,), 4),
        ]
        for begin in begins:
            with pytest.raises(TransferError) as failure:
                begin()
            assert failure.value.reason == "pair_down"


def test_an_idle_channel_stays_up() -> None:
    with pair(config=TransferConfig(silence_timeout_s=0.4, keepalive_s=0.1, streaming="layerwise")) as (
        prefill,
        decode,
    ):
        with pytest.raises(queue.Empty):
            decode.events.get(timeout=1.2)  # three silences long
        assert prefill.silent()
        transfer = Transfer(prefill, decode, 4)
        transfer.complete()
        transfer.release()


def test_pairs_leave_neither_sockets_nor_threads_behind() -> None:
    process = psutil.Process()
    with workers(QUICK, layout(), layout()) as (prefill, decode):
        connect(prefill, decode, 1)
        connect_again(prefill, decode, 2)
        before = process.num_fds(), process.num_threads()
        for epoch in range(3, 13):
            connect_again(prefill, decode, epoch)
        assert process.num_fds() < before[0] + 20  # of 10 epochs with 16 and 6 each; the last ones may still be going
        assert process.num_threads() < before[1] + 20


def connect_again(prefill: Worker, decode: Worker, epoch: int, lost: Sequence[AttemptKey] = ()) -> None:
    for worker, command in zip((prefill, decode), connects(prefill, decode, epoch), strict=True):
        worker.plane.connect(command)
    for worker in (prefill, decode):
        assert [worker.expect(TransferFailed).key for _ in lost] == list(lost)
        assert worker.expect(PairDown).epoch < epoch
        assert worker.expect(PairUp).epoch == epoch


def test_nothing_listens_on_any_other_address() -> None:
    with pair():
        listening = [c for c in psutil.Process(os.getpid()).net_connections("inet") if c.status == psutil.CONN_LISTEN]
        assert listening
        assert {c.laddr.ip for c in listening} == {HOST}
