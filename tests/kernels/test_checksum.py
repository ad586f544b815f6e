"""The checksum: what it must notice, and that it is the same everywhere."""

import random
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels.checksum import checksum

CHUNK = 1 << 16  # words


@pytest.fixture(params=["chosen", "reference"], autouse=True)
def implementation(request: pytest.FixtureRequest) -> Iterator[None]:
    """What this machine chooses, and what runs where there is no compiler."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        if request.param == "reference":
            monkeypatch.setattr("kernels.checksum.function", lambda *_: None)
        yield


def words(num: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, (num,), generator=generator, dtype=torch.int64).to(torch.int32)


def by_definition(data: bytes) -> int:
    """The documented sum, word by word."""
    mask, golden = 2**64 - 1, 0x9E3779B97F4A7C15
    total = len(data) * golden
    data += bytes(-len(data) % 4)
    for i in range(len(data) // 4):
        chunk, j = divmod(i, CHUNK)
        z = (j + 1) * golden & mask
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ z >> 27) * 0x94D049BB133111EB & mask
        weight = (z ^ z >> 31) >> 32 << 32 | (2 * j + 1)
        weight = weight * (1 + (golden * chunk << 32)) + 2 * CHUNK * chunk
        total += int.from_bytes(data[4 * i : 4 * i + 4], "little", signed=True) * weight
    return total & mask


@pytest.mark.parametrize("num_words", [0, 1, 1000, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 77])
def test_it_is_the_documented_sum(num_words: int, device: torch.device) -> None:
    tensor = words(num_words)
    assert checksum(tensor.to(device)) == by_definition(tensor.numpy().tobytes())


@pytest.mark.parametrize("num_bytes", [1, 2, 3, 5, 4 * CHUNK + 2])
def test_bytes_beside_whole_words_count(num_bytes: int, device: torch.device) -> None:
    tensor = words(CHUNK + 1).view(torch.uint8)[:num_bytes]
    assert checksum(tensor.to(device)) == by_definition(tensor.numpy().tobytes())


def test_it_never_changes_between_versions(device: torch.device) -> None:
    """The two sides of a transfer may run different builds."""
    assert checksum(torch.arange(100_000, dtype=torch.int32, device=device)) == 0x8E8773C26229A410


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8])
def test_it_is_of_the_bytes_whatever_the_type(dtype: torch.dtype, device: torch.device) -> None:
    tensor = words(640).to(device)
    assert checksum(tensor.view(dtype)) == checksum(tensor)


def test_layout_and_alignment_in_memory_have_no_effect(device: torch.device) -> None:
    tensor = words(30 * 40).view(30, 40).to(device)
    assert checksum(tensor.t()) == checksum(tensor.t().clone())
    halves = tensor.view(torch.bfloat16).flatten()
    assert checksum(halves[1:101]) == checksum(halves[1:101].clone())


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 3 * CHUNK - 1), st.integers(0, 3 * CHUNK - 1), st.integers(0, 31))
def test_every_flipped_bit_and_every_swap_is_noticed(i: int, j: int, bit: int) -> None:
    tensor = words(3 * CHUNK, seed=1)
    before = checksum(tensor)
    flipped = tensor.clone()
    flipped[i] ^= 1 << bit if bit < 31 else -(2**31)
    assert checksum(flipped) != before
    swapped = tensor.clone()
    swapped[i], swapped[j] = tensor[j], tensor[i]
    assert (checksum(swapped) == before) == bool(tensor[i] == tensor[j])


def test_swapped_words_that_differ_in_their_top_bit_only_are_noticed() -> None:
    """The hardest case for a sum modulo a power of two."""
    tensor = torch.zeros(2 * CHUNK + 9, dtype=torch.int32)
    tensor[5] = -(2**31)
    sums = {checksum(tensor.roll(shift)) for shift in (0, 1, 2, 1 << 10, 1 << 15, CHUNK, CHUNK + 1, 2 * CHUNK)}
    assert len(sums) == 8


@pytest.mark.parametrize("size", [1, 64, 4096, CHUNK])
def test_a_zeroed_or_misplaced_piece_is_noticed(size: int) -> None:
    tensor, rng = words(4 * CHUNK, seed=2), random.Random(0)
    before = checksum(tensor)
    for _ in range(20):
        a, b = (rng.randrange(tensor.numel() // size) * size for _ in range(2))
        zeroed, moved = tensor.clone(), tensor.clone()
        zeroed[a : a + size] = 0
        assert checksum(zeroed) != before
        moved[a : a + size], moved[b : b + size] = tensor[b : b + size], tensor[a : a + size]
        assert (checksum(moved) == before) == (a == b)


def test_trailing_zeros_count(device: torch.device) -> None:
    assert len({checksum(torch.zeros(n, device=device)) for n in range(10)}) == 10
