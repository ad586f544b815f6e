"""Channels come and go one by one: none holds up another, whatever its peer or its transport does."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
from torch import Tensor

from core.errors import TransferError
from core.messages import Connect, PairDown, PairUp
from kv_transfer.config import TransferConfig
from kv_transfer.events import TransferFailed
from kv_transfer.pairs import MAX_ENDED
from tests.kv_transfer.harness import QUICK, WAIT_S, Transfer, Worker, connect, connects, layout, tickets
from tests.kv_transfer.memory_transport import MemoryNetwork, MemoryTransport, Message

HASTY = TransferConfig(connect_timeout_s=5.0, silence_timeout_s=0.3, keepalive_s=0.1, streaming="layerwise")


@contextmanager
def workers(
    number: int, config: TransferConfig = QUICK, network: MemoryNetwork | None = None
) -> Iterator[list[Worker]]:
    with ExitStack() as stack:
        made = [Worker(f"w{i}", layout(), config, network=network) for i in range(number)]
        for worker in made:
            stack.callback(worker.plane.close)
        yield made


def test_a_channel_that_the_router_closes_fails_what_it_carries_and_no_other() -> None:
    with workers(3) as (prefill, first, second):
        connect(prefill, first, 1)
        connect(prefill, second, 2)
        closed, other = Transfer(prefill, first, 8, epoch=1), Transfer(prefill, second, 8, epoch=2)
        closed.begin()
        prefill.plane.disconnect(("w0", "w1"), 1)
        for worker in (prefill, first):
            assert worker.expect(TransferFailed).reason == "pair_down"
            assert worker.expect(PairDown).epoch == 1
        other.complete()
        assert other.arrived()
        closed.release()
        other.release()


def test_the_word_to_close_an_earlier_channel_leaves_the_later_one() -> None:
    with workers(2) as (prefill, decode):
        connect(prefill, decode, 2)
        prefill.plane.disconnect(("w0", "w1"), 1)
        prefill.plane.disconnect(("w0", "nobody"), 1)
        transfer = Transfer(prefill, decode, 4, epoch=2)
        transfer.complete()
        transfer.release()


def test_a_worker_refuses_channels_beyond_those_it_has_room_for() -> None:
    with workers(3, replace(QUICK, max_pairs=1)) as (prefill, first, second):
        connect(prefill, first, 1)
        prefill.plane.connect(connects(prefill, second, 2)[0])
        down = prefill.expect(PairDown)
        assert (down.epoch, down.permanent) == (2, False)
        assert down.reason == "worker w0 has 1 channels: transfer.max_pairs = 1"
        for worker in (prefill, first):
            worker.plane.disconnect(("w0", "w1"), 1)
            assert worker.expect(PairDown).epoch == 1
        connect(prefill, second, 3)


def test_a_channel_that_is_remade_takes_the_place_of_the_old_one() -> None:
    with workers(2, replace(QUICK, max_pairs=1)) as (prefill, decode):
        connect(prefill, decode, 1)
        for worker, command in zip((prefill, decode), connects(prefill, decode, 2), strict=True):
            worker.plane.connect(command)
        for worker in (prefill, decode):
            assert worker.expect(PairDown).epoch == 1
            assert worker.expect(PairUp).epoch == 2


def test_pairs_with_workers_that_are_gone_are_forgotten() -> None:
    with workers(1) as (worker,), socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        server.close()
        for i in range(MAX_ENDED + 10):
            worker.plane.connect(Connect("w0", f"d{i}", 1, address, layout()))
            worker.expect(PairDown)
        assert len(worker.plane._pairs._links) <= MAX_ENDED + 1


class Hanging(MemoryTransport):
    """A transport that minds neither its timeouts nor, where it is `deaf`, that it is aborted."""

    def __init__(self, inner: MemoryTransport, deaf: bool) -> None:
        super().__init__(inner._outward, inner._inward)
        self.hang, self._deaf, self._aborted = threading.Event(), deaf, threading.Event()
        self.let_go = threading.Event()

    def send(self, frame: Tensor, parts: Sequence[Tensor], timeout_s: float) -> Message:
        if self.hang.is_set():
            (self.let_go if self._deaf else self._aborted).wait(WAIT_S)
            raise TransferError("pair_down", "the channel was aborted")
        return super().send(frame, parts, timeout_s)

    def abort(self) -> None:
        if self._deaf and self.hang.is_set():
            self.let_go.wait(WAIT_S)
        self._aborted.set()
        super().abort()


@pytest.mark.parametrize("deaf", [False, True], ids=["abort wakes it", "abort hangs as well"])
def test_the_watchdog_ends_a_channel_that_hangs_and_no_other(monkeypatch: pytest.MonkeyPatch, deaf: bool) -> None:
    network = MemoryNetwork()
    hanging: dict[int, Hanging] = {}
    meet = network.meet

    def meet_one_that_hangs(command: Connect, rank: int, timeout_s: float) -> MemoryTransport:
        transport = meet(command, rank, timeout_s)
        if rank == 0:
            transport = hanging[command.epoch] = Hanging(transport, deaf)
        return transport

    monkeypatch.setattr(network, "meet", meet_one_that_hangs)
    with workers(3, HASTY, network) as (prefill, silent, other):
        connect(prefill, silent, 1)
        connect(prefill, other, 2)
        try:
            carried = Transfer(prefill, silent, 4, epoch=1)
            carried.begin()
            hanging[1].hang.set()
            hung_at = time.monotonic()
            assert prefill.expect(TransferFailed).key == carried.key
            down = prefill.expect(PairDown)
            assert (down.epoch, "watchdog" in down.reason) == (1, True)
            assert time.monotonic() - hung_at < 3 * (HASTY.silence_timeout_s + HASTY.keepalive_s) + 1.0
            whole = Transfer(prefill, other, 4, epoch=2)
            whole.complete()
            assert whole.arrived()
            whole.release()
            carried.release()
            with pytest.raises(TransferError, match="watchdog"):
                prefill.plane.sender.begin(tickets("w0", "w1", 1))
        finally:
            hanging[1].let_go.set()


def test_visitors_that_say_nothing_keep_nobody_waiting() -> None:
    """As of peers that were stopped just after they had come: each would have a second to say whose it is."""
    with workers(2) as (prefill, decode), ExitStack() as silent:
        host, _, port = decode.plane.address.rpartition(":")
        for _ in range(8):
            silent.enter_context(socket.create_connection((host, int(port)), WAIT_S))
        started_at = time.monotonic()
        connect(prefill, decode)
        assert time.monotonic() - started_at < 2.0


def test_a_peer_that_takes_nothing_holds_up_the_engine_once_and_not_for_long() -> None:
    """With staging full, `push` waits on the engine thread, and all other pairs of the worker wait with it."""
    config = replace(QUICK, max_staging_mib=1, silence_timeout_s=8.0, keepalive_s=0.5)
    network, shape = MemoryNetwork(), layout(block_size=512)
    with ExitStack() as stack:
        prefill, silent = (Worker(name, shape, config, network=network, num_blocks=64) for name in ("p", "d"))
        for worker in (prefill, silent):
            stack.callback(worker.plane.close)
        connect(prefill, silent)
        network.to_receiver[1].hold(True)
        num_tokens = 10_000  # 1.3 MB a layer
        waits = []
        for _ in range(2):
            transfer = Transfer(prefill, silent, num_tokens)
            transfer.begin()
            started_at = time.monotonic()
            transfer.push()
            waits.append(time.monotonic() - started_at)
            assert prefill.expect(TransferFailed).reason == "staging_full"
            transfer.release()
        assert config.keepalive_s <= waits[0] < config.silence_timeout_s / 2
        assert waits[1] < config.keepalive_s, "it was known that the peer takes nothing"


def test_a_slow_peer_that_takes_something_is_waited_for() -> None:
    config = replace(QUICK, max_staging_mib=1, keepalive_s=0.5)
    network, shape = MemoryNetwork(), layout(block_size=512)
    with ExitStack() as stack:
        prefill, slow = (Worker(name, shape, config, network=network, num_blocks=64) for name in ("p", "d"))
        for worker in (prefill, slow):
            stack.callback(worker.plane.close)
        connect(prefill, slow)
        pause = threading.Event()

        def late(message: Tensor) -> Tensor:
            pause.wait(0.1)
            return message

        network.to_receiver[1].damage = late
        transfer = Transfer(prefill, slow, 10_000)
        transfer.complete()
        assert transfer.arrived()
        transfer.release()
