"""Payload that is damaged on its way from another process: its request fails closed, and no other with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product

import pytest
import torch

from core.messages import Connect, PairDown, PairUp
from core.ticket import Ticket
from kv_transfer.config import Backend, TransferConfig
from kv_transfer.events import TransferFailed, TransferReady
from tests.kv_transfer.harness import WAIT_S, Worker, layout, plane_threads, tickets
from tests.kv_transfer.sending_process import NUM_TOKENS, Harm, Send, Source, source

SOURCES = ((3, 1, 4), (5, 9, 2), (6, 8, 7))
BACKENDS: list[Backend] = ["shm", "tcp", "gloo"]


@dataclass
class Receiving:
    ticket: Ticket
    blocks: tuple[int, ...]


class Pair:
    """A prefill worker in another process, and a decode worker here, up at epoch 1."""

    def __init__(self, sending: Source, decode: Worker) -> None:
        self.sending, self.decode = sending, decode

    def connect(self, epoch: int) -> None:
        command = Connect(self.sending.name, self.decode.name, epoch, self.decode.plane.address, layout())
        self.decode.plane.connect(command)
        assert self.sending.connect(command)
        self.decode.expect(PairUp)

    def reserve(self, epoch: int = 1) -> Receiving:
        ticket, blocks = tickets(self.sending.name, self.decode.name, epoch), self.decode.take_blocks(NUM_TOKENS)
        self.decode.plane.receiver.begin(ticket, blocks, NUM_TOKENS)
        return Receiving(ticket, blocks)

    def complete(self, receiving: Receiving, blocks: tuple[int, ...]) -> None:
        """Send it unharmed, and see that it is the same here."""
        record, payloads = self.sending.send(Send(receiving.ticket, blocks))
        self.decode.plane.receiver.accept(receiving.ticket.key, record, WAIT_S)
        assert self.decode.expect(TransferReady).key == receiving.ticket.key
        for layer, payload in enumerate(payloads):
            came = self.decode.storage.read(layer, receiving.blocks, 0, NUM_TOKENS)
            assert came.numpy().tobytes() == payload

    def release(self, *receiving: Receiving) -> None:
        for each in receiving:
            self.decode.plane.receiver.release(each.ticket.key)
        self.decode.plane.check_integrity()


@contextmanager
def met(backend: Backend) -> Iterator[Pair]:
    config = TransferConfig(backend=backend, connect_timeout_s=5.0, silence_timeout_s=5.0, lease_s=60.0)
    decode = Worker("decode", layout(), config)
    try:
        with source("prefill", config) as sending:
            pair = Pair(sending, decode)
            pair.connect(1)
            yield pair
    finally:
        decode.plane.close()
    assert plane_threads() == []


@pytest.mark.parametrize(
    ("backend", "harm"), [*product(BACKENDS, ("flip", "zeros")), ("shm", "short"), ("gloo", "short")]
)
def test_what_is_corrupted_or_cut_short_fails_closed_and_the_pair_goes_on(backend: Backend, harm: Harm) -> None:
    with met(backend) as pair:
        before, harmed, after = pair.reserve(), pair.reserve(), pair.reserve()
        pair.complete(before, SOURCES[0])
        record, _ = pair.sending.send(Send(harmed.ticket, SOURCES[1], harm))
        failed = pair.decode.expect(TransferFailed)
        reason = "unexpected_segment" if (backend, harm) == ("shm", "short") else "checksum_mismatch"
        assert (failed.key, failed.reason) == (harmed.ticket.key, reason)
        pair.decode.plane.receiver.accept(harmed.ticket.key, record, WAIT_S)
        pair.release(harmed)
        returned = pair.decode.snapshot()[list(harmed.blocks)]
        pair.complete(after, SOURCES[2])
        assert torch.equal(pair.decode.snapshot()[list(harmed.blocks)], returned)
        assert pair.decode.silent(), "a request that has failed is told of again"
        pair.release(before, after)


def test_a_stream_that_is_cut_short_ends_its_channel_and_another_can_be_made() -> None:
    """Over TCP, where nobody knows any more where the next message begins."""
    with met("tcp") as pair:
        before, harmed, behind = pair.reserve(), pair.reserve(), pair.reserve()
        pair.complete(before, SOURCES[0])
        pair.sending.send(Send(harmed.ticket, SOURCES[1], "short"))
        assert pair.decode.expect(TransferFailed).key == harmed.ticket.key
        assert pair.decode.expect(TransferFailed).key == behind.ticket.key
        assert pair.decode.expect(PairDown).epoch == 1
        pair.release(before, harmed, behind)
        pair.connect(2)
        after = pair.reserve(2)
        pair.complete(after, SOURCES[2])
        pair.release(after)
