"""What carrying KV costs beside gloo alone, between two processes of this machine.

    python -m benchmarks.transfer_timing --quick --json

With --json the last line is one object, {"rows": [...]}. A row's `ratio` is value / peer, and it is `ok` where that
reaches the target; more is better in every row. Values are medians; ours and the peer's are taken in turns, so that
both see the same machine.

Ours is the whole way, up to the word that decode may begin: copy out of the cache, checksum, send, checksum, scatter
into blocks, compare with the commit record. The peer is gloo alone with the same bytes in messages of the same size: it
touches each byte once a side, we three times: hence a target of a quarter, less what a busy machine blurs. What the
engine's thread does of it, reading and the first checksum, must not be what holds a link up: at least half of gloo.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import queue
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection

import torch

from benchmarks.rows import Row
from core.kv_layout import KVLayout
from core.messages import Connect, PairUp
from core.ticket import Ticket
from engine.kv_storage import KVStorage
from kernels.checksum import checksum
from kv_transfer.config import TransferConfig
from kv_transfer.events import KVEvent, TransferReady
from kv_transfer.plane import KVPlane
from kv_transfer.rendezvous import RECEIVER, SENDER, GroupRendezvous

HOST, WAIT_S, MIB = "127.0.0.1", 60.0, 1 << 20
CPU = torch.device("cpu")
CONFIG = TransferConfig(silence_timeout_s=30)  # the machine may be busy
BLOCK_SIZE, NUM_LAYERS = 16, 8
LAYOUT = KVLayout("bench", "", NUM_LAYERS, num_kv_heads=8, head_size=128, block_size=BLOCK_SIZE, dtype="float32")
TOKENS_PER_MIB = MIB // LAYOUT.bytes_per_token_per_layer
TINY_TOKENS = 1
PAIR = ("prefill", "decode")


@dataclass(frozen=True, slots=True)
class Load:
    """`num_layers` segments of `num_tokens` tokens each."""

    num_tokens: int
    num_layers: int = NUM_LAYERS

    @property
    def segment_bytes(self) -> int:
        return self.num_tokens * LAYOUT.bytes_per_token_per_layer

    @property
    def num_bytes(self) -> int:
        return self.num_layers * self.segment_bytes

    @property
    def blocks(self) -> tuple[int, ...]:
        return tuple(range(-(-self.num_tokens // BLOCK_SIZE)))


class Worker:
    """A KV plane, and gloo alone beside it."""

    def __init__(self, name: str, num_tokens: int) -> None:
        torch.set_num_threads(1)
        self.name = name
        self.events: queue.SimpleQueue[KVEvent] = queue.SimpleQueue()
        self.storage = KVStorage(LAYOUT, len(Load(num_tokens).blocks), CPU)
        self.plane = KVPlane(name, self.storage, HOST, CONFIG, time.monotonic, self.events.put)
        self.rendezvous = GroupRendezvous(HOST, CPU, CONFIG)
        self.payload = torch.rand(num_tokens * LAYOUT.bytes_per_token_per_layer // 4).view(torch.uint8)

    def connect(self, plane_address: str, gloo_address: str) -> None:
        self.plane.connect(Connect(*PAIR, 1, plane_address, LAYOUT))
        if not isinstance(self.events.get(timeout=WAIT_S), PairUp):
            raise RuntimeError("the pair did not come up")
        self.gloo = self.rendezvous.meet(
            Connect(*PAIR, 1, gloo_address, LAYOUT), SENDER if self.name == PAIR[0] else RECEIVER
        )

    def close(self) -> None:
        self.gloo.abort()
        self.rendezvous.close()
        self.plane.close()


def receive(pipe: Connection, num_tokens: int) -> None:
    """The decode worker: obeys `(load, ticket)`, where no ticket means gloo alone, until the pipe ends."""
    worker = Worker(PAIR[1], num_tokens)
    pipe.send((worker.plane.address, worker.rendezvous.address))
    worker.connect(worker.plane.address, worker.rendezvous.address)
    receiver = worker.plane.receiver
    while command := pipe.recv():
        load, ticket = command
        if ticket is None:
            for _ in range(load.num_layers):
                worker.gloo.receive_payload(load.segment_bytes, WAIT_S)
        else:
            receiver.begin(ticket, load.blocks, load.num_tokens)
            pipe.send(None)
            receiver.accept(ticket.key, pipe.recv(), WAIT_S)
            if not isinstance(event := worker.events.get(timeout=WAIT_S), TransferReady):
                raise RuntimeError(event)
            receiver.release(ticket.key)
        pipe.send(None)
    worker.close()


class Bench:
    """The prefill worker, in this process."""

    def __init__(self, worker: Worker, pipe: Connection) -> None:
        self._worker, self._pipe, self._num_transfers = worker, pipe, 0

    def transfer(self, load: Load) -> float:
        """Seconds from the first layer to the decode side's word that all has come and is right."""
        self._num_transfers += 1
        ticket = Ticket("r", 1, f"transfer-{self._num_transfers}", *PAIR, 1)
        sender, token_ids = self._worker.plane.sender, [0] * load.num_tokens
        self._pipe.send((load, ticket))
        self._pipe.recv()
        started_at = time.perf_counter()
        sender.begin(ticket)
        for layer in range(load.num_layers):
            sender.push(ticket.key, layer, 0, load.num_tokens, load.blocks)
        self._pipe.send(sender.commit(ticket.key, token_ids))
        self._pipe.recv()
        seconds = time.perf_counter() - started_at
        sender.release(ticket.key)
        return seconds

    def gloo(self, load: Load) -> float:
        """Seconds for the same bytes over gloo alone, to the other side's word that they have come."""
        self._pipe.send((load, None))
        started_at = time.perf_counter()
        for _ in range(load.num_layers):
            self._worker.gloo.send_payload(self._worker.payload[: load.segment_bytes], WAIT_S)
        self._pipe.recv()
        return time.perf_counter() - started_at

    def read(self, load: Load) -> float:
        """Seconds that the engine thread spends: copies out of the cache, and their checksums."""
        started_at = time.perf_counter()
        for layer in range(load.num_layers):
            checksum(self._worker.storage.read(layer, load.blocks, 0, load.num_tokens))
        return time.perf_counter() - started_at


@contextmanager
def bench(num_tokens: int) -> Iterator[Bench]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=receive, args=(theirs, num_tokens), daemon=True)
    process.start()
    theirs.close()
    worker = Worker(PAIR[0], num_tokens)
    try:
        worker.connect(*ours.recv())
        yield Bench(worker, ours)
        ours.send(None)
        process.join(WAIT_S)
    finally:
        process.kill()
        worker.close()


def in_turns(num_repeats: int, *measures: Callable[[], float]) -> list[float]:
    """Medians. The first turn warms up and does not count."""
    turns = [[measure() for measure in measures] for _ in range(num_repeats + 1)][1:]
    return [statistics.median(times) for times in zip(*turns, strict=True)]


def run(num_mib: int, num_repeats: int) -> list[Row]:
    """`num_mib`: the large segments; those of 1 MiB are always measured."""
    rows = []
    with bench(num_mib * TOKENS_PER_MIB) as b:
        for mib in (1, num_mib):
            load = Load(mib * TOKENS_PER_MIB)
            size = load.num_bytes / MIB
            ours, read, peer = in_turns(
                num_repeats, partial(b.transfer, load), partial(b.read, load), partial(b.gloo, load)
            )
            rows += [
                Row.of(f"transfer in segments of {mib} MiB", size / ours, "MiB/s", 0.2, size / peer),
                Row.of(f"read and checksum of {mib} MiB", size / read, "MiB/s", 0.5, size / peer),
            ]
        load = Load(TINY_TOKENS)
        ours, peer = in_turns(num_repeats * 10, partial(b.transfer, load), partial(b.gloo, load))
        rows.append(Row.of(f"transfers of {NUM_LAYERS} tiny segments", 1 / ours, "1/s", 0.2, 1 / peer))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="few repetitions, for a test")
    parser.add_argument("--json", action="store_true", help="end with one line of JSON")
    arguments = parser.parse_args()
    rows = run(16, 4 if arguments.quick else 20)
    for row in rows:
        peer = "" if row.peer is None else f"  (peer {row.peer:.1f}, ratio {row.ratio:.2f}, target {row.target})"
        print(f"{row.name:36} {row.value:10.1f} {row.unit}{peer}")
    if arguments.json:
        print(json.dumps({"rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
