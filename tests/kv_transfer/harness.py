"""Workers' KV planes in one process, and what the tests ask of them."""

from __future__ import annotations

import itertools
import queue
import random
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from core.clock import Clock
from core.kv_layout import KVLayout
from core.messages import Connect, PairUp
from core.ticket import CommitRecord, Ticket
from engine.kv_storage import KVStorage
from kernels.paged_kv import token_views
from kv_transfer.config import TransferConfig
from kv_transfer.events import KVEvent, TransferReady
from kv_transfer.plane import KVPlane
from kv_transfer.rendezvous import Rendezvous
from tests.kv_transfer.memory_transport import MemoryNetwork

HOST = "127.0.0.1"
WAIT_S = 10.0
"""For anything that should happen at once."""
QUICK = TransferConfig(connect_timeout_s=5.0, silence_timeout_s=2.0, keepalive_s=0.2, streaming="layerwise")

Event = TypeVar("Event", bound=object)
_numbers = itertools.count(1)


def layout(
    *,
    block_size: int = 4,
    dtype: str = "float32",
    num_layers: int = 3,
    fingerprint: str = "f",
    kind: str = "heads",
) -> KVLayout:
    return KVLayout("model", fingerprint, num_layers, 2 if kind == "heads" else 1, 8, block_size, dtype, kind)


def tickets(prefill: str, decode: str, epoch: int, attempt: int = 1, transfer_id: str | None = None) -> Ticket:
    number = next(_numbers)
    return Ticket(f"request-{number}", attempt, transfer_id or f"{number:032x}", prefill, decode, epoch)


class Worker:
    """A KV plane over a cache of random numbers, the events that it told, and the blocks it hands out."""

    def __init__(
        self,
        name: str,
        shape: KVLayout,
        config: TransferConfig = QUICK,
        *,
        num_blocks: int = 64,
        network: MemoryNetwork | None = None,
        clock: Clock = time.monotonic,
        rendezvous: Rendezvous | None = None,
    ) -> None:
        self.name, self.layout = name, shape
        self.storage = KVStorage(shape, num_blocks, torch.device("cpu"))
        for layer in self.storage.layers:
            for view in token_views(layer):
                view.copy_(30 * torch.randn(view.shape))
        self.events: queue.SimpleQueue[KVEvent] = queue.SimpleQueue()
        if network is not None:
            rendezvous = network.rendezvous(name, config.connect_timeout_s)
        self.plane = KVPlane(name, self.storage, HOST, config, clock, self.events.put, rendezvous)
        self._free = random.Random(name).sample(range(num_blocks), num_blocks)

    def take_blocks(self, num_tokens: int) -> tuple[int, ...]:
        """Block ids in no order, for a request of so many tokens."""
        num_blocks = -(-num_tokens // self.layout.block_size)
        taken, self._free = self._free[:num_blocks], self._free[num_blocks:]
        return tuple(taken)

    def expect(self, kind: type[Event], timeout_s: float = WAIT_S) -> Event:
        """The next event, which must be of this kind."""
        event = self.events.get(timeout=timeout_s)
        assert isinstance(event, kind), event
        return event

    def silent(self) -> bool:
        return self.events.empty()

    def snapshot(self) -> torch.Tensor:
        """[num_blocks, N]: all that any layer holds of each block."""
        views = [view for layer in self.storage.layers for view in token_views(layer)]
        return torch.cat([view.flatten(1) for view in views], dim=1)


def connects(prefill: Worker, decode: Worker, epoch: int) -> tuple[Connect, Connect]:
    """What the router says to the prefill and to the decode worker."""
    address = decode.plane.address
    return (
        Connect(prefill.name, decode.name, epoch, address, decode.layout),
        Connect(prefill.name, decode.name, epoch, address, prefill.layout),
    )


def connect(prefill: Worker, decode: Worker, epoch: int = 1) -> None:
    """Have both sides build the pair's channel, and wait until it is up."""
    to_prefill, to_decode = connects(prefill, decode, epoch)
    decode.plane.connect(to_decode)
    prefill.plane.connect(to_prefill)
    for worker in (prefill, decode):
        up = worker.expect(PairUp)
        assert up == PairUp(prefill.name, decode.name, epoch, up.transport)


@contextmanager
def pair(
    *,
    config: TransferConfig = QUICK,
    prefill_layout: KVLayout | None = None,
    decode_layout: KVLayout | None = None,
    network: MemoryNetwork | None = None,
    clock: Clock = time.monotonic,
) -> Iterator[tuple[Worker, Worker]]:
    """A prefill worker `p` and a decode worker `d`, their channel up at epoch 1; no thread is left afterwards."""
    prefill = Worker("p", prefill_layout or layout(), config, network=network, clock=clock)
    decode = Worker("d", decode_layout or layout(), config, network=network, clock=clock)
    try:
        connect(prefill, decode)
        yield prefill, decode
        for worker in (prefill, decode):
            worker.plane.check_integrity()
    finally:
        prefill.plane.close()
        decode.plane.close()
    assert plane_threads() == []


def plane_threads(*, but: str = "none") -> list[str]:
    """Names of the threads of all planes, but those that begin with `but`."""
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if name.startswith("kv-") and not name.startswith(but)]


class Transfer:
    """One request's way from a prefill to a decode worker."""

    def __init__(
        self,
        prefill: Worker,
        decode: Worker,
        num_tokens: int,
        *,
        num_skipped: int = 0,
        epoch: int = 1,
        ticket: Ticket | None = None,
    ) -> None:
        self.prefill, self.decode, self.num_tokens, self.num_skipped = prefill, decode, num_tokens, num_skipped
        self.token_ids = random.Random(num_tokens).choices(range(1000), k=num_tokens)
        self.ticket = ticket or tickets(prefill.name, decode.name, epoch)
        self.source, self.target = prefill.take_blocks(num_tokens), decode.take_blocks(num_tokens)

    @property
    def key(self) -> tuple[str, int]:
        return self.ticket.key

    def begin(self) -> None:
        skipped = self.token_ids[: self.num_skipped]
        self.decode.plane.receiver.begin(self.ticket, self.target, self.num_tokens, skipped)
        self.prefill.plane.sender.begin(self.ticket, skipped)

    def push(self, start: int = 0, end: int | None = None, layers: Sequence[int] | None = None) -> None:
        for layer in layers if layers is not None else range(self.prefill.layout.num_layers):
            self.prefill.plane.sender.push(self.key, layer, start, end or self.num_tokens, self.source)

    def commit(self) -> CommitRecord:
        return self.prefill.plane.sender.commit(self.key, self.token_ids)

    def accept(self, record: CommitRecord, deadline_s: float = WAIT_S) -> None:
        self.decode.plane.receiver.accept(self.key, record, deadline_s)

    def complete(self) -> None:
        """From the first segment to the last, in one chunk."""
        self.begin()
        self.push()
        self.accept(self.commit())
        assert self.decode.expect(TransferReady).key == self.key

    def release(self) -> None:
        self.prefill.plane.sender.release(self.key)
        self.decode.plane.receiver.release(self.key)

    def arrived(self) -> bool:
        """Whether the decode side's blocks equal the prefill side's, bit by bit, wherever KV was to be sent."""
        span = (self.num_skipped, self.num_tokens)
        return all(
            torch.equal(
                self.prefill.storage.read(layer, self.source, *span),
                self.decode.storage.read(layer, self.target, *span),
            )
            for layer in range(self.prefill.layout.num_layers)
        )
