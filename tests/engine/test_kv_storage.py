"""Reading and writing ranges of positions across blocks."""

import random
from itertools import pairwise

import pytest
import torch

from core.errors import IntegrityError
from core.kv_layout import KVLayout
from engine.kv_storage import KVStorage

LAYOUT = KVLayout("m", "f", num_layers=2, num_kv_heads=3, head_size=4, block_size=5, dtype="float32")


def payload(num_tokens: int, device: torch.device) -> torch.Tensor:
    return torch.randn(2, num_tokens, 3, 4, device=device)


def test_what_is_written_is_read(device: torch.device) -> None:
    """Two requests over shuffled blocks, written piece by piece, read in other pieces."""
    storage, rng = KVStorage(LAYOUT, 9, device), random.Random(0)
    tables = {"a": (7, 0, 3, 8), "b": (5, 1)}
    whole = {name: payload(5 * len(table), device) for name, table in tables.items()}
    for name, table in tables.items():
        cuts = sorted({0, 5 * len(table), *(rng.randrange(5 * len(table)) for _ in range(3))})
        for start, end in pairwise(cuts):
            storage.write(1, table, start, end, whole[name][:, start:end])
    for name, table in tables.items():
        for _ in range(20):
            start, end = sorted((rng.randrange(5 * len(table) + 1), rng.randrange(5 * len(table) + 1)))
            assert torch.equal(storage.read(1, table, start, end), whole[name][:, start:end])


def test_other_layers_and_blocks_are_left_alone(device: torch.device) -> None:
    storage = KVStorage(LAYOUT, 4, device)
    storage.write(1, (2,), 1, 4, payload(3, device))
    assert storage.layers[0].count_nonzero() == 0
    assert storage.layers[1].flatten(1).any(dim=1).tolist() == [False, False, True, False]
    assert storage.layers[1][2].flatten(1).any(dim=1).tolist() == [False, True, True, True, False]


def test_what_is_read_is_a_contiguous_copy(device: torch.device) -> None:
    storage = KVStorage(LAYOUT, 4, device)
    copy = storage.read(0, (1, 2), 3, 8)
    assert copy.is_contiguous()
    storage.write(0, (1, 2), 3, 8, payload(5, device))
    assert copy.count_nonzero() == 0


def test_a_block_may_be_read_by_a_table_with_other_cuts(device: torch.device) -> None:
    storage, tokens = KVStorage(LAYOUT, 4, device), payload(10, device)
    storage.write(0, (3, 1), 0, 10, tokens)
    assert torch.equal(storage.read(0, (1,), 0, 5), tokens[:, 5:])


@pytest.mark.parametrize(("start", "end"), [(0, 11), (-1, 3), (4, 3), (10, 12)])
def test_positions_outside_of_the_table_are_refused(start: int, end: int, device: torch.device) -> None:
    with pytest.raises(IntegrityError, match="not within 2 blocks of 5"):
        KVStorage(LAYOUT, 4, device).read(0, (1, 2), start, end)


def test_an_empty_range_is_empty(device: torch.device) -> None:
    assert KVStorage(LAYOUT, 4, device).read(0, (1, 2), 5, 5).shape == (2, 0, 3, 4)


@pytest.mark.parametrize("bad", [torch.zeros(2, 4, 3, 4), torch.zeros(2, 3, 3, 4, dtype=torch.bfloat16)])
def test_a_payload_of_another_shape_or_type_is_refused(bad: torch.Tensor, device: torch.device) -> None:
    with pytest.raises(IntegrityError, match=r"must be float32 \(2, 3, 3, 4\)"):
        KVStorage(LAYOUT, 4, device).write(0, (1,), 0, 3, bad)


def test_a_payload_may_lie_elsewhere_and_be_strided(device: torch.device) -> None:
    storage, tokens = KVStorage(LAYOUT, 4, device), torch.randn(4, 2, 3, 4).transpose(0, 1)
    storage.write(0, (1,), 0, 4, tokens)
    assert torch.equal(storage.read(0, (1,), 0, 4).cpu(), tokens)
