"""What carrying KV costs, between two processes of this machine.

    python -m benchmarks.transfer [--quick] [--json] [--output FILE]

Links: the whole way of a prompt's KV, up to the word that decode may begin (out of the cache, over, into blocks, every
byte under a checksum, compared with the commit record), beside the least that could be done. For shared memory that is
one copy of the same bytes in memory; for gloo and TCP, gloo alone with messages of the same size. Beside a real model:
what sending costs its prefill, what of it is not hidden behind it, and from which length on layers should leave one by
one (`transfer_prefill`). And, but for a quick run, what the death of a decode worker costs the streams that it wrote
(`recovery`).

More is better in every row; `ratio` is value / peer, and a row is `ok` where that reaches the target. Values are
medians; ours and the peer's are taken in turns, so that both see the same machine. With --json all that is printed is
one object, {"rows": [...]}.
"""

from __future__ import annotations

import time
from functools import partial

import torch

from benchmarks.command import run_command
from benchmarks.recovery import recovery_rows
from benchmarks.rows import Row
from benchmarks.transfer_link import CPU, Load, in_turns, link
from benchmarks.transfer_prefill import prefill_rows
from core.kv_layout import KVLayout
from engine.kv_storage import KVStorage
from kernels.memory import zeros
from kv_transfer.config import Backend

MIB = 1 << 20
LAYOUT = KVLayout("bench", "", num_layers=8, num_kv_heads=8, head_size=128, block_size=16, dtype="float32")
MAX_OVERHEAD_S = 0.003
MEMCPY = "peer: one thread's memcpy of as many bytes in pieces of that size, between two touched memories in huge pages"
COLD, WARM = "too large for the processor's caches, as KV is", "which stay in the processor's caches"
GLOO = "peer: gloo alone, a message a segment, one at a time, between two touched memories in huge pages"


def load_of(segment_mib: int) -> Load:
    return Load(LAYOUT, segment_mib * MIB // LAYOUT.bytes_per_token_per_layer)


def filled_storage(load: Load) -> KVStorage:
    storage = KVStorage(load.layout, len(load.blocks), CPU)
    payload = torch.rand(load.segment_bytes // 4).view(torch.uint8)
    for layer in range(load.layout.num_layers):
        storage.write(layer, load.blocks, 0, load.num_tokens, payload)
    return storage


def shared_memory_rows(num_mib: int, num_repeats: int) -> list[Row]:
    """`num_mib`: the large segments; those of 1 MiB are always measured."""
    rows, storage = [], filled_storage(load_of(num_mib))
    source, target = (zeros(load_of(num_mib).num_bytes).fill_(1) for _ in range(2))
    with link(storage, "shm") as ours:
        for mib in (num_mib, 1):
            load = load_of(mib)
            pieces = range(0, load.num_bytes, load.segment_bytes)

            def memcpy(load: Load = load, pieces: range = pieces) -> float:
                started_at = time.perf_counter()
                for start in pieces:
                    target[start : start + load.segment_bytes].copy_(source[start : start + load.segment_bytes])
                return time.perf_counter() - started_at

            taken, copied = in_turns(num_repeats, partial(ours.transfer, load), memcpy)
            size = load.num_bytes / MIB
            target_ratio = 0.8 if mib == num_mib else 0.0
            name = f"shared memory, segments of {mib} MiB"
            rows.append(
                Row.of(
                    name,
                    size / taken,
                    "MiB/s",
                    target_ratio,
                    size / copied,
                    detail=f"{MEMCPY}, {COLD if mib == num_mib else WARM}",
                )
            )
        taken = in_turns(num_repeats * 10, partial(ours.reserve_and_transfer, Load(LAYOUT, 1)))[0]
        detail = f"{1000 * taken:.2f} ms, with {LAYOUT.num_layers} tiny segments; commands by pipe, no router"
        rows.append(Row.of("reserve and commit", 1 / taken, "1/s", 1 / MAX_OVERHEAD_S, detail=detail))
    return rows


def network_rows(backend: Backend, num_mib: int, num_repeats: int) -> list[Row]:
    """Over the loopback network: `gloo`, or `tcp`, which is chosen between hosts."""
    rows, storage = [], filled_storage(load_of(num_mib))
    payload = zeros(load_of(num_mib).num_bytes).fill_(1)
    with link(storage, backend) as ours:
        for mib, target in ((num_mib, 0.85), (1, 0.6)):
            load = load_of(mib)
            taken, alone = in_turns(num_repeats, partial(ours.transfer, load), partial(ours.gloo, payload, load))
            size = load.num_bytes / MIB
            name = f"{backend}, segments of {mib} MiB"
            rows.append(Row.of(name, size / taken, "MiB/s", target, size / alone, detail=GLOO))
    return rows


def run(num_mib: int, num_repeats: int, *, with_recovery: bool = False) -> list[Row]:
    torch.set_num_threads(1)
    rows = shared_memory_rows(num_mib, num_repeats)
    rows += network_rows("gloo", num_mib, num_repeats) + network_rows("tcp", num_mib, num_repeats)
    rows += prefill_rows(num_repeats)
    return rows + (recovery_rows() if with_recovery else [])


if __name__ == "__main__":
    run_command("transfer", __doc__, lambda quick: run(16, 5 if quick else 25, with_recovery=not quick))
