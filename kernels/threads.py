"""How many threads compute, and on which cores: those of the C++ kernels, and torch's beside them."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from kernels.native import function, library


def set_num_threads(num_threads: int, cpus: Sequence[int] = ()) -> None:
    """Threads of every operation of this process from now on, the calling one included.

    Where `cpus` are given, the kernels' other threads are pinned to them in order, from the second on: the first is the
    caller's own. Where there are C++ kernels, torch computes on the caller's thread alone: two sets of threads would
    fight for the same cores.
    """
    native = library()
    if native is None:
        torch.set_num_threads(num_threads)
        return
    torch.set_num_threads(1)
    native.penstock_set_num_threads(num_threads, (ctypes.c_int32 * len(cpus))(*cpus), len(cpus))


@contextmanager
def awake() -> Iterator[None]:
    """Within it the threads wait for the next operation without going to sleep, up to some milliseconds.

    For steps of many operations: to wake up takes a thread longer than one operation may take.
    """
    set_within_step = function("penstock_set_within_step", "i")
    if set_within_step is None:
        yield
        return
    set_within_step(True)
    try:
        yield
    finally:
        set_within_step(False)


def num_threads() -> int:
    native = library()
    return torch.get_num_threads() if native is None else int(native.penstock_num_threads())
