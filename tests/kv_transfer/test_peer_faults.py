"""A peer that dies or falls silent: the survivor knows in time, loses that pair alone, and pairs anew."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from core.messages import Connect, PairDown, PairUp
from core.ticket import Ticket
from kv_transfer.config import Backend, TransferConfig
from kv_transfer.events import TransferFailed
from tests.kv_transfer.harness import Transfer, Worker, connect, layout, plane_threads, tickets
from tests.kv_transfer.peer_process import Peer, peer

CONFIG = TransferConfig(connect_timeout_s=5.0, silence_timeout_s=1.0, keepalive_s=0.3)
BOTH = pytest.mark.parametrize("backend", ["shm", "tcp", "gloo"])
SLACK_S = 1.5
"""For a loaded machine."""


class Survivor:
    """The worker that lives on, as either side of a pair with a peer."""

    def __init__(self, worker: Worker, sends: bool) -> None:
        self.worker, self.sends = worker, sends

    def connect(self, other: Peer, epoch: int) -> None:
        prefill, decode = (self.worker.name, other.name) if self.sends else (other.name, self.worker.name)
        address = other.address if self.sends else self.worker.plane.address
        command = Connect(prefill, decode, epoch, address, layout())
        other.connect(command)
        self.worker.plane.connect(command)
        up = self.worker.expect(PairUp)
        assert up == PairUp(prefill, decode, epoch, up.transport)
        assert other.is_up()

    def begin(self, other: Peer, epoch: int) -> Ticket:
        """A transfer that is under way."""
        blocks = self.worker.take_blocks(8)
        if self.sends:
            ticket = tickets(self.worker.name, other.name, epoch)
            self.worker.plane.sender.begin(ticket)
        else:
            ticket = tickets(other.name, self.worker.name, epoch)
            self.worker.plane.receiver.begin(ticket, blocks, 8)
        return ticket

    def release(self, ticket: Ticket) -> None:
        self.worker.plane.sender.release(ticket.key)
        self.worker.plane.receiver.release(ticket.key)


@contextmanager
def survivor(sends: bool, config: TransferConfig) -> Iterator[Survivor]:
    worker = Worker("survivor", layout(), config)
    try:
        yield Survivor(worker, sends)
    finally:
        worker.plane.close()
    assert plane_threads() == []


@pytest.mark.parametrize("sends", [True, False], ids=["decode dies", "prefill dies"])
@BOTH
def test_a_killed_peer_is_known_within_two_seconds_and_may_come_back(backend: Backend, sends: bool) -> None:
    config = TransferConfig(backend=backend)
    with survivor(sends, config) as living:
        with peer("first", config) as first:
            living.connect(first, 1)
            ticket = living.begin(first, 1)
            killed_at = time.monotonic()
            first.signal(signal.SIGKILL)
            failed = living.worker.expect(TransferFailed, 2.0)
            assert (failed.key, failed.reason) == (ticket.key, "pair_down")
            down = living.worker.expect(PairDown, 2.0)
            assert (down.epoch, down.permanent) == (1, False)
            assert time.monotonic() - killed_at < 2.0
        living.release(ticket)
        with peer("second", config) as second:
            living.connect(second, 2)
            living.release(living.begin(second, 2))
        assert living.worker.expect(PairDown).epoch == 2
        assert living.worker.silent()
        living.worker.plane.check_integrity()


@pytest.mark.parametrize("sends", [True, False], ids=["decode stops", "prefill stops"])
@BOTH
def test_a_peer_that_is_stopped_is_given_up_after_its_silence(backend: Backend, sends: bool) -> None:
    config = replace(CONFIG, backend=backend)
    with survivor(sends, config) as living, peer("stopped", config) as other:
        living.connect(other, 1)
        ticket = living.begin(other, 1)
        stopped_at = time.monotonic()
        other.signal(signal.SIGSTOP)
        assert living.worker.expect(TransferFailed).key == ticket.key
        assert living.worker.expect(PairDown).epoch == 1
        silence_s = time.monotonic() - stopped_at
        assert silence_s < 2 * CONFIG.keepalive_s + CONFIG.silence_timeout_s + SLACK_S
        assert silence_s > CONFIG.silence_timeout_s - CONFIG.keepalive_s
        living.release(ticket)


def test_a_dead_peer_leaves_other_pairs_alone() -> None:
    with survivor(True, CONFIG) as living, peer("dies", CONFIG) as other:
        decode = Worker("lives", layout(), CONFIG)
        try:
            connect(living.worker, decode)
            transfer = Transfer(living.worker, decode, 8)
            transfer.begin()
            living.connect(other, 1)
            other.signal(signal.SIGKILL)
            assert living.worker.expect(PairDown, 2.0).decode_incarnation == other.name
            transfer.push()
            transfer.accept(transfer.commit())
            decode.events.get(timeout=2.0)
            assert transfer.arrived()
            transfer.release()
        finally:
            decode.plane.close()
