import gc
import re
from pathlib import Path

import pytest

from kernels.memory import Arena, zeros

MIB = 2**20


def resident_mib() -> int:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found.group(1)) // 1024


@pytest.mark.parametrize("num_bytes", [0, 1, 4096, 5 * MIB + 3])
def test_all_are_zero_and_can_be_written(num_bytes: int) -> None:
    memory = zeros(num_bytes)
    assert memory.shape == (num_bytes,)
    assert not memory.any()
    memory.fill_(7)
    assert int(memory.sum()) == 7 * num_bytes


def test_memory_is_free_when_its_views_are_gone() -> None:
    gc.collect()
    before = resident_mib()
    view = zeros(256 * MIB).fill_(1)[5:9]
    assert resident_mib() > before + 200
    del view
    gc.collect()
    assert resident_mib() < before + 50


def test_pieces_of_an_arena_are_apart() -> None:
    allocate = Arena()
    pieces = [allocate(n) for n in (3, 64, 100, 65 * MIB, 1)]
    assert [piece.numel() for piece in pieces] == [3, 64, 100, 65 * MIB, 1]
    for i, piece in enumerate(pieces, start=1):
        assert piece.data_ptr() % 64 == 0
        assert not piece.any()
        piece.fill_(i)
    assert [int(piece.max()) for piece in pieces] == [int(piece.min()) for piece in pieces] == [1, 2, 3, 4, 5]
