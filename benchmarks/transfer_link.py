"""A prefill worker in this process, a decode worker in another, and what one measures between them."""

from __future__ import annotations

import multiprocessing
import queue
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch

from core.kv_layout import KVLayout
from core.messages import Connect, PairUp
from core.ticket import Ticket
from engine.kv_storage import KVStorage
from kernels.memory import zeros
from kv_transfer.config import Backend, TransferConfig
from kv_transfer.events import KVEvent, TransferReady
from kv_transfer.pair_store import dist
from kv_transfer.plane import KVPlane

HOST, WAIT_S = "127.0.0.1", 60.0
CPU = torch.device("cpu")
GLOO_TAG = 1
PAIR = ("prefill", "decode")
ARRIVED_S = 0.02
"""Long enough for segments to arrive that were sent before."""


@dataclass(frozen=True, slots=True)
class Load:
    """A segment of `num_tokens` tokens for each layer of a layout."""

    layout: KVLayout
    num_tokens: int

    @property
    def segment_bytes(self) -> int:
        return self.num_tokens * self.layout.bytes_per_token_per_layer

    @property
    def num_bytes(self) -> int:
        return self.layout.num_layers * self.segment_bytes

    @property
    def blocks(self) -> tuple[int, ...]:
        return tuple(range(-(-self.num_tokens // self.layout.block_size)))


class Worker:
    """A KV plane over a cache."""

    def __init__(self, name: str, storage: KVStorage, backend: Backend) -> None:
        self.name, self.storage = name, storage
        self.events: queue.SimpleQueue[KVEvent] = queue.SimpleQueue()
        config = TransferConfig(backend=backend, silence_timeout_s=30, lease_s=WAIT_S)  # the machine may be busy
        self.plane = KVPlane(name, storage, HOST, config, time.monotonic, self.events.put)

    def connect(self, address: str) -> None:
        """With the other worker."""
        self.plane.connect(Connect(*PAIR, 1, address, self.storage.layout))
        if not isinstance(event := self.events.get(timeout=WAIT_S), PairUp):
            raise RuntimeError(event)


def gloo_alone(store: str, rank: int) -> Any:
    """A process group of the two, beside the pair's. `store`: path of a file by which they meet."""
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=HOST)]
    options._timeout, options._threads = timedelta(seconds=WAIT_S), 1
    return dist.ProcessGroupGloo(dist.FileStore(store, 2), rank, 2, options)


def receive(pipe: Connection, layout: KVLayout, num_blocks: int, backend: Backend, store: str) -> None:
    """The decode worker: obeys `(load, ticket)`, where no ticket means gloo alone, until the pipe ends."""
    torch.set_num_threads(1)
    worker = Worker(PAIR[1], KVStorage(layout, num_blocks, CPU), backend)
    pipe.send(worker.plane.address)
    worker.connect(worker.plane.address)
    receiver, gloo = worker.plane.receiver, gloo_alone(store, 1)
    landing = zeros(num_blocks * layout.bytes_per_block)
    while command := pipe.recv():
        load, ticket = command
        if ticket is None:
            for target in torch.split(landing[: load.num_bytes], load.segment_bytes):
                gloo.recv([target], 0, GLOO_TAG).wait(timedelta(seconds=WAIT_S))
        else:
            receiver.begin(ticket, load.blocks, load.num_tokens)
            pipe.send(None)
            receiver.accept(ticket.key, pipe.recv(), WAIT_S)
            if not isinstance(event := worker.events.get(timeout=WAIT_S), TransferReady):
                raise RuntimeError(event)
            receiver.release(ticket.key)
        pipe.send(None)
    worker.plane.close()


class Sending:
    """One request's way, from the side of the prefill worker."""

    def __init__(self, worker: Worker, pipe: Connection, load: Load, number: int) -> None:
        self._worker, self._pipe, self._load = worker, pipe, load
        self._ticket = Ticket("r", 1, f"transfer-{number}", *PAIR, 1)
        pipe.send((load, self._ticket))
        pipe.recv()
        worker.plane.sender.begin(self._ticket)

    def push(self, layer: int) -> None:
        load = self._load
        self._worker.plane.sender.push(self._ticket.key, layer, 0, load.num_tokens, load.blocks)

    def push_at_once(self, layer: int) -> None:
        """`push`, and let it leave whatever its size."""
        self.push(layer)
        self._worker.plane.sender.flush(self._ticket.key)

    def finish(self) -> None:
        """Commit, and wait for the other side's word that decode may begin."""
        sender = self._worker.plane.sender
        self._pipe.send(sender.commit(self._ticket.key, [0] * self._load.num_tokens))
        self._pipe.recv()
        sender.release(self._ticket.key)


class Link:
    """The prefill worker, in this process."""

    def __init__(self, worker: Worker, pipe: Connection, gloo: Any) -> None:
        self._worker, self._pipe, self._gloo, self._num_transfers = worker, pipe, gloo, 0

    def begin(self, load: Load) -> Sending:
        self._num_transfers += 1
        return Sending(self._worker, self._pipe, load, self._num_transfers)

    def transfer(self, load: Load) -> float:
        """Seconds from the first layer to the word that all has come and is right."""
        sending = self.begin(load)
        started_at = time.perf_counter()
        for layer in range(load.layout.num_layers):
            sending.push(layer)
        sending.finish()
        return time.perf_counter() - started_at

    def reserve_and_transfer(self, load: Load) -> float:
        """`transfer`, with the time to reserve before it."""
        started_at = time.perf_counter()
        self.transfer(load)
        return time.perf_counter() - started_at

    def last_segment(self, load: Load) -> float:
        """Seconds from the last layer to that word, where all others have come before."""
        sending = self.begin(load)
        for layer in range(load.layout.num_layers - 1):
            sending.push_at_once(layer)
        time.sleep(ARRIVED_S)
        started_at = time.perf_counter()
        sending.push(load.layout.num_layers - 1)
        sending.finish()
        return time.perf_counter() - started_at

    def gloo(self, payload: torch.Tensor, load: Load) -> float:
        """Seconds for the same bytes, a message for each segment, over gloo alone, to the other side's word for it.

        From one memory to another that are as large as the whole load, as the two caches are; `payload` is the first.
        """
        self._pipe.send((load, None))
        started_at = time.perf_counter()
        for source in torch.split(payload[: load.num_bytes], load.segment_bytes):
            self._gloo.send([source], 1, GLOO_TAG).wait(timedelta(seconds=WAIT_S))
        self._pipe.recv()
        return time.perf_counter() - started_at


@contextmanager
def link(storage: KVStorage, backend: Backend) -> Iterator[Link]:
    """From `storage` to a process with one like it."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as folder:
        store = f"{folder}/gloo"
        arguments = (theirs, storage.layout, storage.num_blocks, backend, store)
        process = context.Process(target=receive, args=arguments, daemon=True)
        process.start()
        theirs.close()
        worker = Worker(PAIR[0], storage, backend)
        try:
            worker.connect(ours.recv())
            yield Link(worker, ours, gloo_alone(store, 0))
            ours.send(None)
            process.join(WAIT_S)
        finally:
            process.kill()
            worker.plane.close()


def in_turns(num_repeats: int, *measures: Callable[[], float]) -> list[float]:
    """Medians. The first turn warms up and does not count."""
    turns = [[measure() for measure in measures] for _ in range(num_repeats + 1)][1:]
    return [statistics.median(times) for times in zip(*turns, strict=True)]
